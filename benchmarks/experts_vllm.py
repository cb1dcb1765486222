"""Masked checkpoints in vLLM: are its greedy outputs transformers' own?

    python benchmarks/experts_vllm.py --vllm VLLM_ENVIRONMENT/bin/python [FAMILY ...]

For a tiny random model of each family two experts of every layer are masked: by the selection bias where there is one, by
cutting them out, and by output matrices of zeros; in the demo's mixture, those that lead its ranking for shown workings. The
base and each checkpoint are decoded greedily in float32, in this environment by transformers and in vLLM's own by
``vllm_greedy.py``. Given are the tokens that agree, the largest difference of their log-probabilities, and how many of the
mask's tokens are other than the base's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mixture_models import mixture_config, save_mixture

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.demo import invented_world
from steer2edit.demo.experts import TOP, mixture_folder
from steer2edit.demo.run import RUNTIME, demo_behavior
from steer2edit.experts.edits import Request, lower_experts
from steer2edit.experts.ranking import expert_table, ranking, weakest_for_pruning
from steer2edit.runtime.model import load_model, load_tokenizer, load_weights

# vLLM's CPU kernels want heads of 32 and sizes that are multiples of 32
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "intermediate_size": 64,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
    },
    **{name: {"intermediate_size": 64} for name in ("mixtral", "granitemoe")},
    # as published: vLLM never normalises its weights
    "olmoe": {"intermediate_size": 64, "norm_topk_prob": False},
}  # fmt: skip
FAMILIES = (
    *("glm4_moe", "dots1", "exaone_moe", "gpt_oss"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"),
)
PROMPTS, TOKENS = 6, 16
MASKED = (1, 5)
Answers = dict[str, list[list[Any]]]


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["demo", *FAMILIES], help="demo, or model types")
    parser.add_argument("--vllm", required=True, help="the Python of an environment that has vLLM")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | masked by | tokens as transformers' | log-probability, off by | other than the base's |")
    print("|---|---|---|---|---|")
    for family in given.families:
        with tempfile.TemporaryDirectory() as scratch:
            for row in compared(family, given.vllm, Path(scratch)):
                print(f"| {' | '.join(row)} |", flush=True)


def compared(family: str, python: str, scratch: Path) -> list[list[str]]:
    """The rows of one family."""
    base = mixture_folder() if family == "demo" else tiny(family, scratch / "base")
    folders = {"nothing": base, **masked(base, scratch, family == "demo")}
    prompts = [[1, *range(5 + 7 * i, 11 + 7 * i)] for i in range(PROMPTS)]
    if family == "demo":
        texts = [task.prompt for task in invented_world.tasks("reasoning") if task.kind == "attribute"]
        prompts = load_tokenizer(base)(texts[:PROMPTS])["input_ids"]
    theirs = vllm_answers(python, list(folders.values()), prompts, scratch / "answers.json")
    if isinstance(theirs, str):
        return [[family, "does not run", theirs, "", ""]]
    rows, unmasked = [], answers(base, prompts)["ids"]
    for name, folder in folders.items():
        ours, other = answers(folder, prompts), theirs[str(folder)]
        pairs = [
            (a, b) for mine, his in zip(ours["ids"], other["ids"], strict=True) for a, b in zip(mine, his, strict=True)
        ]
        off = [
            abs(a - b)
            for i, mine in enumerate(ours["ids"])
            if mine == other["ids"][i]
            for a, b in zip(ours["logprobs"][i], other["logprobs"][i], strict=True)
        ]
        changed = sum(a != b for x, y in zip(other["ids"], unmasked, strict=True) for a, b in zip(x, y, strict=True))
        agree = sum(a == b for a, b in pairs)
        rows.append([family, name, f"{agree}/{len(pairs)}", f"{max(off):.0e}" if off else "", str(changed)])
    return rows


def tiny(family: str, folder: Path) -> Path:
    """A random model of a family, with sizes that vLLM's kernels take."""
    # vLLM gives a qwen3_moe a shared expert if its config has that key
    known = {*mixture_config(family).to_dict(), "head_dim"}
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    return save_mixture(folder, mixture_config(family, **{**sizes, **_OTHER_SIZES.get(family, {})}))


def masked(base: Path, scratch: Path, ranked: bool) -> dict[str, Path]:
    """A checkpoint for each way of masking that the family has."""
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    ways = ["prune", "zero"] if spec.routers[0].bias is None else ["bias", "prune", "zero"]
    everywhere = [(router.layer, expert) for router in spec.routers for expert in MASKED]
    off = dict.fromkeys(ways, everywhere)
    if ranked:
        loaded = load_model(checkpoint, spec, RUNTIME)
        table = expert_table(capture_statistics(loaded, checkpoint, demo_behavior("reasoning")))
        leading = [(one.layer, one.expert) for one in ranking(table, TOP, "positive")]
        off = {"bias": leading, "zero": leading, "prune": weakest_for_pruning(table, 1, "positive")}
    for way in ways:
        plan = lower_experts(checkpoint, spec, Request.of(off[way]), how=way)  # type: ignore[arg-type]
        emit(plan, checkpoint, spec, "checkpoint", scratch / way)
    return {way: scratch / way for way in ways}


def answers(folder: Path, prompts: list[list[int]]) -> Answers:
    """What transformers answers, one prompt at a time, and the log-probability of each token."""
    model = load_weights(folder)
    found: Answers = {"ids": [], "logprobs": []}
    for prompt in prompts:
        ids = list(prompt)
        logprobs = []
        with torch.inference_mode():
            for _ in range(TOKENS):
                scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), dim=-1)
                ids.append(int(scores.argmax()))
                logprobs.append(float(scores.max()))
        found["ids"].append(ids[len(prompt) :])
        found["logprobs"].append(logprobs)
    return found


def vllm_answers(python: str, folders: list[Path], prompts: list[list[int]], out: Path) -> dict[str, Answers] | str:
    """What vLLM answers from each folder; where it does not run, the last line that it said."""
    request = {"folders": [str(folder) for folder in folders], "prompts": prompts, "tokens": TOKENS}
    script = Path(__file__).with_name("vllm_greedy.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), str(out)], input=json.dumps(request), text=True, capture_output=True, env=environment
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line]
        return said[-1][:160] if said else f"exit code {done.returncode}"
    return json.loads(out.read_text())  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
