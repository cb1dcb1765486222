"""The LoRA target: a PEFT adapter that is exactly the plan's low-rank update.

Every engine reads this layout: magnitudes inside float32 tensors, ``lora_alpha == r``, one rank, a list of target modules. Every
layer of a targeted type has a pair of tensors, which are zero where nothing is edited. A layer's routed experts are one parameter
of three dimensions in PEFT: ``lora_A`` [experts · r, in] has an expert's rows together, ``lora_B`` [out, r · experts] its columns
``experts`` apart. A change of a writer's bias, or a new one, is the bias of ``lora_B`` (PEFT's ``lora_bias``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.config import text_config
from steer2edit.architecture.wrappers import TEXT_ALONE
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError, listing
from steer2edit.files.atomic import save_tensors
from steer2edit.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from steer2edit.lowering import (
    Change,
    Comparison,
    HubEntry,
    Lowering,
    PeftAdapter,
    Place,
    Resolved,
    Snippet,
    Writing,
    adapter_refusal,
    compare_with_lowered,
    expert_factors,
    low_rank_forms,
    rank_notes,
    writer_factors,
)
from steer2edit.plan import Bias, LowRank
from steer2edit.progress import Progress

SUMMARY = "A PEFT LoRA adapter beside the base, for PEFT and vLLM."
HUB = HubEntry(
    "A LoRA adapter with a steering vector compiled into its weights by steer2edit: no training, no hooks, no changed "
    "architecture.",
    "adapter",
    "peft",
    ("lora",),
)
WHOLE_MODEL = False
STRUCTURE = False

# PEFT's own list: kernels of these models may read the matrix past the module that an adapter wraps
NO_ADAPTER = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")

# PEFT passes an adapter's names through transformers' renaming of checkpoints, which changes these, though they are right, or
# takes them for the experts'
MISREAD_BY_PEFT: Mapping[str, tuple[MatrixRole, ...]] = {
    **dict.fromkeys(("deepseek_ocr2_text", "unlimited_ocr_text"), tuple(MatrixRole)),
    "glm4v_moe_text": (MatrixRole.MLP_OUT, MatrixRole.SHARED_EXPERT_OUT, MatrixRole.GATE, MatrixRole.UP),
    "laguna": (MatrixRole.SHARED_EXPERT_OUT, MatrixRole.GATE, MatrixRole.UP),
    "mistral_large4_text": (MatrixRole.SHARED_EXPERT_OUT, MatrixRole.GATE, MatrixRole.UP),
}
# PEFT takes targets of these names for the fused experts' matrices, and leaves dense and shared MLPs' out
_EXPERTS_NAMES = ("gate_proj", "up_proj", "down_proj")
MOVED_BY_PEFT = (
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "qwen3_moe", "qwen3_next"),
    *("qwen3_omni_moe_text", "sarvam_mla", "solar_open"),
)
# types whose experts' edits were run in PEFT, and had the plan's numbers there (docs/engines.md)
EXPERTS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "glm4_moe", "dots1", "ernie4_5_moe"),
    *("hunyuan_v1_moe", "exaone_moe", "deepseek_v2", "deepseek_v3"),
)
# their modules have other names in vLLM, whose table of names lacks those of transformers
NO_PLACE_IN_VLLM = (
    *("granite_speech", "granite_speech_plus", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "voxtral"),
)

_ANY = LowRank("", torch.zeros(1, 1), torch.zeros(1, 1))


def check(resolved: Resolved) -> None:
    """Raise TargetError for edits that no LoRA can carry."""
    spec = resolved.spec
    refused = [
        f"{name}: {why}"
        for name, (edit, site) in resolved.edits.items()
        if (
            why := adapter_refusal(edit, site, experts=spec.model_type in EXPERTS, biases=True)
            or _peft_refusal(spec, site)
            or (
                "a bias of a matrix that PEFT takes for a parameter"
                if isinstance(edit, Bias) and _moved(spec, site)
                else ""
            )
        )
    ]
    if refused:
        raise TargetError(
            f"a LoRA adapter that engines load carries none of these edits:\n{listing(refused)}\nUse --to checkpoint."
        )
    if not resolved.edits:
        raise TargetError("the plan is empty; there is nothing for an adapter to carry")
    targeted, experts = _targeted(resolved)
    if any(isinstance(edit, Bias) for edit, _ in resolved.edits.values()) and (
        experts or any(_moved(spec, site) for site in targeted)
    ):
        raise TargetError(
            "PEFT gives biases to modules alone, and this plan edits parameters too. Use --to checkpoint."
        )


def lower(resolved: Resolved, folder: Path, writing: Writing, progress: Progress) -> Lowering:
    """Write the adapter into ``folder``. Raises TargetError for edits that no LoRA can carry."""
    check(resolved)
    plan, spec = resolved.plan, resolved.spec
    edits = low_rank_forms(resolved)
    biases = {site.key: edit.delta for edit, site in resolved.edits.values() if isinstance(edit, Bias)}
    rank = max((edit.B.shape[1] for edit in edits.values()), default=1)
    targeted, experts = _targeted(resolved)
    leaves = {_leaf(site) for site in targeted}
    tensors = {}
    for module, sites in experts.items():
        stacked_B, stacked_A = expert_factors(edits, sites, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = stacked_A.flatten(0, 1)
        tensors[f"base_model.model.{module}.lora_B.weight"] = stacked_B.permute(1, 2, 0).flatten(1).contiguous()
    for site in targeted:
        B, A = writer_factors(edits.get(site.key), site, rank)
        tensors[f"base_model.model.{site.module}.lora_A.weight"] = A
        tensors[f"base_model.model.{site.module}.lora_B.weight"] = B
        if biases:
            zeros = torch.zeros(site.out_features)
            tensors[f"base_model.model.{site.module}.lora_B.bias"] = biases.get(site.key, zeros).clone()
    moved = [site for site in targeted if _moved(spec, site)]
    save_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.base.name,
        "revision": plan.base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        **({"lora_bias": True} if biases else {}),
        "fan_in_fan_out": bool(targeted) and targeted[0].orientation == "in_out",
        "target_modules": _target_modules([site for site in targeted if site not in moved], resolved.checkpoint),
    }
    parameters = [f"{module}.down_proj" for module in experts] + [f"{site.module}.weight" for site in moved]
    if parameters:
        config["target_parameters"] = sorted(parameters)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    changes = tuple(Change(edit.tensor, "LowRank", edit.norm) for edit in edits.values())
    changes += tuple(
        Change(edit.tensor, type(edit).__name__, edit.norm)
        for edit, _ in resolved.edits.values()
        if isinstance(edit, Bias)
    )
    notes = ["Stored in float32: cast to bf16, an adapter loses about three digits.", *rank_notes(rank)]
    if resolved.checkpoint.config.get("model_type") in TEXT_ALONE:
        notes.append(
            "It fits the language model alone (AutoModelForCausalLM). vLLM 0.32 loads it and applies none of it: there "
            "'language_model.' has to stand before its modules' names. Serve --to checkpoint there, or rename them."
        )
    if resolved.checkpoint.config.get("model_type") in NO_PLACE_IN_VLLM:
        notes.append(
            "By its source, vLLM 0.32 loads this adapter and ignores it: it does not rename this model's modules. Serve --to "
            "checkpoint there."
        )
    if biases:
        notes.append(
            "Its biases (lora_bias) are PEFT's: vLLM refuses such an adapter, and PEFT cannot merge it into a model without "
            "biases. Serve --to checkpoint there."
        )
    if experts:
        notes.append(
            "For PEFT, in whose layout experts' edits are. vLLM has another one, and does not apply these; it was not run."
        )
    elif moved:
        notes.append(
            "Dense MLPs are target_parameters, since PEFT takes target_modules of that name for experts. vLLM was not run."
        )
    return Lowering("exact", changes, tuple(notes), {"rank": rank, "target_modules": sorted(leaves)})


def verify(resolved: Resolved, folder: Path, progress: Progress) -> Comparison:
    """Compare the adapter with the one that the plan gives."""
    return compare_with_lowered(lower, resolved, folder, progress)


def loadable(resolved: Resolved, folder: Path) -> PeftAdapter:
    """The folder is a PEFT adapter."""
    return PeftAdapter(folder)


def load_snippet(place: Place) -> Snippet:
    """By PEFT, which fetches the base itself where the base is on the Hub."""
    if place.published and place.auto_class == "AutoModelForCausalLM":
        auto = f"model = AutoPeftModelForCausalLM.from_pretrained({place.quoted})"
        return Snippet("python", ("from peft import AutoPeftModelForCausalLM", auto))
    lines = (
        "from peft import PeftModel",
        f"from transformers import {place.auto_class}",
        f"base = {place.auto_class}.from_pretrained({place.quoted_base})",
        f"model = PeftModel.from_pretrained(base, {place.quoted})",
    )
    return Snippet("python", lines)


def loading_files(folder: Path, names: Sequence[str]) -> set[str]:
    """All files: the target wrote each of them for loading."""
    return set(names)


def _targeted(resolved: Resolved) -> tuple[list[Site], dict[str, list[Site]]]:
    """The sites of every type of module that is edited, and the edited layers' experts, by module."""
    spec, edited = resolved.spec, {site.key for _, site in resolved.edits.values()}
    single = [
        site for site in (*spec.sites, *spec.readers) if not adapter_refusal(replace(_ANY, tensor=site.matrix), site)
    ]
    leaves = {_leaf(site) for site in single if site.key in edited}
    experts: dict[str, list[Site]] = {}
    for site in (site for site in spec.sites if site.expert is not None):
        experts.setdefault(site.module, []).append(site)
    chosen = {module: sites for module, sites in experts.items() if any(site.key in edited for site in sites)}
    return [site for site in single if _leaf(site) in leaves], chosen


def _moved(spec: ModelSpec, site: Site) -> bool:
    return spec.model_type in MOVED_BY_PEFT and _leaf(site) in _EXPERTS_NAMES


def _peft_refusal(spec: ModelSpec, site: Site) -> str:
    if site.role is MatrixRole.MIXER_OUT and spec.model_type in NO_ADAPTER:
        return "a Mamba mixer, which PEFT refuses to wrap"
    if site.role in MISREAD_BY_PEFT.get(spec.model_type, ()):
        return "PEFT takes its name for another module's"
    return ""


def _leaf(site: Site) -> str:
    # CTRL's ffn.2: a bare number would also name blocks
    *_, before, last = site.module.split(".")
    return f"{before}.{last}" if last.isdigit() else last


def _target_modules(targeted: list[Site], checkpoint: Checkpoint) -> list[str]:
    """Last components; whole paths in a multimodal model, whose other parts may have modules of those names.

    What its files call them does not tell: transformers renames a tower's tensors when it loads them.
    """
    leaves = sorted({_leaf(site) for site in targeted})
    ours = {site.tensor for site in targeted}
    others = [n for n in checkpoint.tensors if n not in ours and any(n.endswith(f".{leaf}.weight") for leaf in leaves)]
    return sorted(site.module for site in targeted) if others or text_config(checkpoint.config).nested else leaves
