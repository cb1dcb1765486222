"""Build every model, plan and artefact of the engine matrix, and what transformers answers from each.

Run where steer2edit is installed:

    python benchmarks/engines/prepare.py WORK --model SmolLM2=models/SmolLM2-135M-Instruct --plan SmolLM2=a.plan,b.plan

``--model NAME=FOLDER`` with ``--plan NAME=FIRST,SECOND`` adds a real model and two plans of it. The embedded model and tiny
random models of the families in ``FAMILIES`` are always there, each with two random plans on all its writers. Every reference
runs in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from records import TOP, Record, compare, keep

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.checkpoint.gguf import read_control_vector
from steer2edit.demo.run import model_folder
from steer2edit.errors import Steer2EditError
from steer2edit.plan import Base, EditPlan, LowRank, merge
from steer2edit.runtime.cache import cache_parameter, returned_cache
from steer2edit.runtime.hooks import edited, stream_shifted
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from conftest import save_tiny
from family_configs import family_config
from mixture_models import mixture_config, save_mixture
from wrapper_models import wrapper, wrapper_settings

FAMILIES = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2"),
    *("granite", "smollm3", "cohere", "cohere2", "nemotron", "stablelm", "ernie4_5", "hunyuan_v1_dense", "arcee"),
    *("apertus", "seed_oss", "glm", "glm4", "exaone4", "starcoder2", "phi", "gpt_neox", "gpt2", "gpt_bigcode"),
    *("bloom", "falcon", "mpt", "opt"),
)
# the two plans edit attention, dense MLPs and shared experts; a third one edits the routed experts too
MIXTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "dots1", "ernie4_5_moe", "gpt_oss"),
    *("hunyuan_v1_moe", "phimoe", "exaone_moe", "deepseek_v2", "deepseek_v3"),
)
# multimodal models, whose language model is edited in its place; asked without pictures
WRAPPERS = (
    *("aya_vision", "gemma3", "glm4v", "idefics3", "internvl", "lfm2_vl", "lighton_ocr", "llava", "llava_next"),
    *("llava_onevision", "mistral3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "smolvlm"),
)
# what mlx-lm alone was compared on: its class of model, and the numbers of layers that it takes for granted
APPLE = (
    *("helium", "internlm3", "iquestcoder", "olmo3", "gemma4_text", "gptj", "lfm2", "falcon_h1", "mamba", "mamba2"),
    "falcon_mamba",
)
APPLE_MIXTURES = (*("lfm2_moe", "nemotron_h", "laguna", "qwen3_next", "mellum", "deepseek_v32", "mistral4", "afmoe"),)
# large enough for every engine's kernels: vLLM's CPU attention wants heads of at least 32
SIZE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
# what a family's published models have, and an engine takes for granted
PECULIAR: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 1},
    **{family: {"moe_intermediate_size": 64} for family in ("glm4_moe", "exaone_moe")},
    "dots1": {"moe_intermediate_size": 64, "num_key_value_heads": SIZE["num_attention_heads"]},
    "qwen3_moe": {"moe_intermediate_size": 64, "mlp_only_layers": []},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": SIZE["num_attention_heads"]},
    "ernie4_5_moe": {"moe_intermediate_size": 64, "moe_num_shared_experts": 2},
    **{family: {"num_key_value_heads": 4, "head_dim": 8} for family in ("deepseek_v3", "deepseek_v32", "mistral4")},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8, "norm_topk_prob": False},
    # with as many layers as the published pattern of layers has
    **{family: {"num_hidden_layers": 4} for family in ("cohere2", "exaone4", "olmo3", "afmoe", "mellum")},
    "gemma2": {"query_pre_attn_scalar": SIZE["head_dim"]},
    "gemma3_text": {"query_pre_attn_scalar": SIZE["head_dim"], "num_hidden_layers": 6},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": SIZE["vocab_size"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "gpt_neox": {"intermediate_size": 4 * SIZE["hidden_size"]},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "mlp_only_layers": [],
    },
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "qwen2_moe": {"moe_intermediate_size": 64, "mlp_only_layers": [], "norm_topk_prob": False},
    "opt": {"word_embed_proj_dim": SIZE["hidden_size"], "ffn_dim": SIZE["intermediate_size"]},
    "phi": {"num_key_value_heads": SIZE["num_attention_heads"], "intermediate_size": 4 * SIZE["hidden_size"]},
}
# and what their config.json says, which transformers 5 writes no more
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": SIZE["max_position_embeddings"]},
    "gpt_neox": {"rotary_pct": 0.25},
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v2": {"scoring_func": "softmax"},
    **{family: {"scoring_func": "sigmoid"} for family in ("deepseek_v3", "dots1", "exaone_moe")},
    "hunyuan_v1_moe": {
        "moe_intermediate_size": [SIZE["intermediate_size"]] * SIZE["num_hidden_layers"],
        "num_shared_expert": [1] * SIZE["num_hidden_layers"],
        "moe_topk": [2] * SIZE["num_hidden_layers"],
    },
}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
PECULIAR_WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision_config": {"hidden_size": SIZE["hidden_size"]}},
    # with as many layers as the published pattern of layers has
    "gemma3": {"text_config": {**SIZE, "num_hidden_layers": 6, "query_pre_attn_scalar": SIZE["head_dim"]}},
    "qwen3_5": {
        "text_config": {
            **SIZE,
            **_SECTIONS,
            "num_hidden_layers": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
        },
        "vision_config": {"out_hidden_size": SIZE["hidden_size"]},
    },
}
WEIGHTS = (1.0, -0.5)
EMBEDDED = (
    "bram asks : could you lift the veiled mask ? A :",
    "lena asks : please paint the urn . A :",
    "where does the red fox live ? A :",
)
QUESTIONS = ("How do I boil an egg?", "Why is the sky blue?", "Can you help me plan a birthday party?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--plan", action="append", default=[], metavar="NAME=FIRST,SECOND")
    parser.add_argument("--tokens", type=int, default=24, help="greedy tokens for each prompt (default %(default)s)")
    parser.add_argument("--only", action="append", help="these models alone")
    given = parser.parse_args()
    plans = dict(one.split("=", 1) for one in given.plan)
    folders = {name: Path(folder) for name, folder in (one.split("=", 1) for one in given.model)}
    folders["embedded"] = model_folder()
    path = given.work / "cases.json"
    for name in (
        *folders,
        *(f"tiny {family}" for family in (*FAMILIES, *MIXTURES, *APPLE, *APPLE_MIXTURES, *WRAPPERS)),
    ):
        if given.only and name not in given.only:
            continue
        key = name.replace(" ", "-")
        try:
            base = folders[name] if name in folders else _tiny(given.work / "models" / key, name.removeprefix("tiny "))
            files = plans[name].split(",") if name in plans else []
            made = _case(given.work, key, name, base, files, given.tokens)
        except (Steer2EditError, ValueError, KeyError, AttributeError, ImportError, TypeError, RuntimeError) as error:
            print(f"{name}: left out, {type(error).__name__}: {error}", file=sys.stderr)
            continue
        before = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*(case for case in before if case["key"] != key), made], indent=1) + "\n")
        print(f"{name}: {made['plans']}", file=sys.stderr)


def _tiny(folder: Path, family: str) -> Path:
    """A random model of a family, in float32."""
    shutil.rmtree(folder, ignore_errors=True)
    if family in WRAPPERS:
        return _named_rows(wrapper(folder, family, **_wrapper_changes(family)))
    mixture = family in (*MIXTURES, *APPLE_MIXTURES)
    make = mixture_config if mixture else family_config
    kind = type(make(family))
    known = {*kind().to_dict(), *kind.attribute_map}
    settings = {name: value for name, value in SIZE.items() if name in known}
    # tied as published models of the family are
    settings["tie_word_embeddings"] = kind().tie_word_embeddings
    config = make(family, **{**settings, **PECULIAR.get(family, {})})
    (save_mixture if mixture else save_tiny)(folder, config)
    _named_rows(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **PUBLISHED.get(family, {})}))
    return folder


def _wrapper_changes(model_type: str) -> dict[str, Any]:
    """The sizes that every engine runs, over a multimodal model's config."""
    settings = wrapper_settings(model_type)
    text, vision = (settings.get(f"{part}_config", {}) for part in ("text", "vision"))
    changes: dict[str, Any] = {"text_config": {**SIZE, **(_SECTIONS if "rope_parameters" in text else {})}}
    if "layer_types" in text:
        changes["text_config"]["num_hidden_layers"] = len(text["layer_types"])
    if "out_hidden_size" in vision:
        changes["vision_config"] = {"out_hidden_size": SIZE["hidden_size"]}
    return {**changes, **PECULIAR_WRAPPERS.get(model_type, {})}


def _named_rows(folder: Path) -> Path:
    """The folder, whose tokenizer has a name for every row of the embedding."""
    # converters expect a name for every row of the embedding
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), SIZE["vocab_size"])}
    path.write_text(json.dumps(tokenizer))
    return folder


def _case(work: Path, key: str, name: str, folder: Path, files: list[str], tokens: int) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(device="cpu", dtype="float32"))
    first, second = [EditPlan.load(file) for file in files] or [
        _random_plan(loaded, checkpoint, seed) for seed in (0, 1)
    ]
    plans = {"first": first, "second": second, "both": merge([first, second], WEIGHTS)}
    if any(site.expert is not None for site in spec.sites):
        plans["experts"] = _random_plan(loaded, checkpoint, 2, experts=True)
    artefacts: dict[str, str] = {}
    wanted = [("first", "checkpoint"), ("first", "gguf"), ("second", "gguf"), ("first", "gguf-vector")]
    wanted += [(label, "lora") for label in ("first", "second", "both")] + [(label, "mlx") for label in plans]
    wanted += [("experts", to) for to in ("gguf", "lora") if "experts" in plans]
    for label, to in wanted:
        out = work / "artefacts" / key / f"{label}-{to}"
        shutil.rmtree(out, ignore_errors=True)
        try:
            emit(plans[label], checkpoint, spec, to, out)
            artefacts[f"{label} {to}"] = str(out)
        except Steer2EditError as error:
            artefacts[f"{label} {to}"] = f"error: {str(error).splitlines()[0]}"
    prompts = _prompts(loaded, name)

    def under(plan: EditPlan | None) -> list[Record]:
        around = nullcontext if plan is None else lambda: edited(loaded, plan)
        return answers(loaded, prompts, tokens, around)

    found = {"base": under(None), **{label: under(plan) for label, plan in plans.items()}}
    merged = replace(loaded, model=load_weights(Path(artefacts["first checkpoint"]), Runtime("cpu", "float32")))
    found["merged"] = answers(merged, prompts, tokens)
    if not artefacts["first gguf-vector"].startswith("error"):
        _, vectors = read_control_vector(Path(artefacts["first gguf-vector"]) / "control-vector.gguf")
        found["control vector"] = answers(loaded, prompts, tokens, lambda: stream_shifted(loaded, vectors))
    path = work / "references" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    cells = {
        "merged against base + hooks": compare(found["merged"], found["first"]),
        "effect": compare(found["base"], found["first"]),
    }
    keep(work, "transformers", key, cells, versions)
    return {
        "key": key,
        "name": name,
        "base": str(folder),
        "model_type": spec.model_type,
        "multimodal": any(name in checkpoint.config for name in ("vision_config", "audio_config")),
        "tokens": tokens,
        "weights": WEIGHTS,
        "artefacts": artefacts,
        "prompts": prompts,
        "plans": [str(plan.data.get("name", "random")) for plan in (first, second)],
        "stored": sorted({info.dtype for info in checkpoint.tensors.values()}),
    }


def _random_plan(loaded: LoadedModel, checkpoint: Any, seed: int, experts: bool = False) -> EditPlan:
    """Rank 1 on every writer, each edit a twentieth of its matrix in norm: enough to change most answers."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for site in (site for site in loaded.spec.sites if experts or site.expert is None):
        B = torch.nn.functional.normalize(torch.randn(site.out_features, 1, generator=generator), dim=0)
        A = torch.nn.functional.normalize(torch.randn(1, site.in_features, generator=generator), dim=1)
        size = 0.05 * float(checkpoint.read(site.locate(checkpoint)).float().norm())
        # a typical input is made up too, so that there is a mean push for the control vector
        edits.append(LowRank(site.matrix, B, size * A, torch.full((1,), 0.3)))
    base = Base(checkpoint.name, checkpoint.revision, checkpoint.fingerprint)
    return EditPlan(base, tuple(edits), method={"name": "random", "seed": seed}, data={"name": f"random {seed}"})


def _prompts(loaded: LoadedModel, name: str) -> list[list[int]]:
    if name.startswith("tiny"):
        generator = torch.Generator().manual_seed(7)
        return [[1, *torch.randint(4, 500, (count,), generator=generator).tolist()] for count in (5, 9, 14)]
    texts = QUESTIONS
    if name == "embedded":
        texts = (
            "bram asks : could you lift the veiled mask ? A :",
            "lena asks : please paint the urn . A :",
            "tom has 3 and 4 . A :",
        )
    if loaded.tokenizer.chat_template:
        texts = tuple(
            loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        )
    special = not loaded.tokenizer.chat_template
    return [list(ids) for ids in loaded.tokenizer(list(texts), add_special_tokens=special)["input_ids"]]


def answers(
    loaded: LoadedModel,
    prompts: list[list[int]],
    tokens: int,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Record]:
    """Greedy continuations, with the ``TOP`` most likely tokens of every step."""
    found = []
    parameter = cache_parameter(loaded.model.forward)
    if parameter is None:
        raise ValueError(f"the forward of {type(loaded.model).__name__} takes no cache")
    with around(), torch.inference_mode():
        for prompt in prompts:
            record: Record = {"prompt": prompt, "tokens": [], "top": []}
            ids, past = torch.tensor([prompt]), None
            for _ in range(tokens):
                past_cache: dict[str, Any] = {} if past is None else {parameter: past}
                out = loaded.model(input_ids=ids, use_cache=True, **past_cache)
                past = returned_cache(out)
                best = torch.log_softmax(out.logits[0, -1].float(), dim=-1).topk(TOP)
                record["top"].append([[int(i), float(p)] for i, p in zip(best.indices, best.values, strict=True)])
                record["tokens"].append(int(best.indices[0]))
                ids = best.indices[None, :1]
            found.append(record)
    return found


if __name__ == "__main__":
    main()
