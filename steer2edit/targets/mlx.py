"""The MLX target: an adapter for mlx-lm, on Apple's machines, that is exactly the plan's low-rank update.

mlx-lm computes ``y + scale · (x lora_a) lora_b`` beside the base's own matrix, quantised or not, in the wider of the two dtypes.
``lora_a`` is [in, r], ``lora_b`` is [r, out], both float32 here, and ``scale`` is 1. A layer's routed experts are one module,
with ``lora_a`` [experts, r, in] and ``lora_b`` [experts, out, r]. The config states one rank for all modules, the names of
the modules inside a block (``keys``), and how many blocks have them, counted from the last.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.checkpoint import Checkpoint, read_json
from steer2edit.errors import CheckpointError, PlanError, TargetError, listing
from steer2edit.files.atomic import load_tensors, save_tensors
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.lowering import (
    AppliedPlan,
    Change,
    Comparison,
    HubEntry,
    Lowering,
    Place,
    Resolved,
    Snippet,
    Writing,
    adapter_refusal,
    compare_with_lowered,
    expert_factors,
    low_rank_forms,
    writer_factors,
)
from steer2edit.plan import EditPlan, LowRank
from steer2edit.progress import Progress

SUMMARY = "An adapter for mlx-lm, for any MLX copy of the base."
HUB = HubEntry(
    "An adapter for mlx-lm with a steering vector compiled into its weights by steer2edit: no training, no hooks, no changed "
    "architecture.",
    "adapter",
    "mlx",
    ("lora", "mlx"),
)
WHOLE_MODEL = False
STRUCTURE = False
FILE = "adapters.safetensors"
COMPARED = "mlx-lm 0.32.2"
"""The release against which names and numbers were compared."""

_WRAPPED = (("model.language_model.", "language_model.model."),)
MODULES: Mapping[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral3", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text"),
            *("gemma4_text", "smollm3", "cohere", "cohere2", "nemotron", "stablelm", "ernie4_5", "hunyuan_v1_dense"),
            *("seed_oss", "helium", "internlm3", "iquestcoder", "granite", "olmo2", "olmo3", "glm4", "starcoder2"),
            *("exaone4", "apertus", "lfm2", "falcon_h1", "mamba", "mamba2", "falcon_mamba"),
            # mixtures
            *("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "mellum", "granitemoe"),
            *("gpt_oss", "dots1", "glm4_moe", "deepseek_v3", "deepseek_v32", "mistral4", "afmoe"),
        ),
        (),
    ),
    "gpt_neox": (("gpt_neox.layers.", "model.h."),),
    "gptj": (("transformer.h.", "model.h."),),
    "laguna": ((".shared_experts.", ".shared_expert."),),
    "lfm2_moe": tuple(
        (f".feed_forward.w{n}", f".feed_forward.{one}_proj") for n, one in ((2, "down"), (1, "gate"), (3, "up"))
    ),
    "nemotron_h": (("model.layers.", "backbone.layers."),),
    **dict.fromkeys(("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl"), _WRAPPED),
}
"""What differs in mlx-lm's name of a writer from transformers', by the config's own model type: (theirs, mlx-lm's)."""

EXPERTS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            *("qwen3_moe", "qwen2_moe", "olmoe", "mellum", "deepseek_v3", "deepseek_v32", "glm4_moe", "laguna"),
            "mistral4",
        ),
        (".mlp.experts", ".mlp.switch_mlp.down_proj"),
    ),
    **dict.fromkeys(("dots1", "afmoe", "gpt_oss"), (".mlp.experts", ".mlp.experts.down_proj")),
    **dict.fromkeys(("mixtral", "phimoe"), (".mlp.experts", ".block_sparse_moe.switch_mlp.down_proj")),
    "granitemoe": (".block_sparse_moe.experts", ".block_sparse_moe.switch_mlp.down_proj"),
    "lfm2_moe": (".feed_forward.experts", ".feed_forward.switch_mlp.down_proj"),
    "nemotron_h": (".mixer.experts", ".mixer.switch_mlp.fc2"),
}
"""The same of a layer's routed experts, whose output matrices are one module there."""

NO_READERS = ("afmoe", "cohere2", "exaone4", "lfm2", "mamba2", "olmo3")
"""Model types whose readers' names were not compared."""
_TAKEN_APART = "kv_b_proj"  # mlx-lm has two modules for it


def check(resolved: Resolved) -> None:
    """Raise TargetError for edits and families that no adapter of mlx-lm can carry."""
    if not resolved.edits:
        raise TargetError("the plan is empty; there is nothing for an adapter to carry")
    kind = model_kind(resolved.checkpoint)
    refused = [
        f"{name}: {why}"
        for name, one in resolved.edits.items()
        if (why := adapter_refusal(*one, experts=kind in EXPERTS) or _reader_refusal(one[1], kind))
    ]
    if refused:
        raise TargetError(
            f"an adapter for mlx-lm carries low-rank edits of matrices, and none of these:\n{listing(refused)}\n"
            "Use --to checkpoint, and convert that."
        )


def lower(resolved: Resolved, folder: Path, writing: Writing, progress: Progress) -> Lowering:
    """Write the adapter into ``folder``. Raises TargetError for edits and families that no adapter of mlx-lm can carry."""
    check(resolved)
    spec, kind = resolved.spec, model_kind(resolved.checkpoint)
    edits = low_rank_forms(resolved)
    rank = max(edit.B.shape[1] for edit in edits.values())
    edited = [site for site in _carried(spec, kind) if site.key in edits]
    first = min(site.layer for site in edited)
    keys = {_key(module_name(site, kind), site) for site in edited}
    tensors: dict[str, torch.Tensor] = {}
    for name, sites in _modules(spec, kind).items():
        if sites[0].layer < first or _key(name, sites[0]) not in keys:
            continue
        if sites[0].expert is None:
            B, A = writer_factors(edits.get(sites[0].key), sites[0], rank)
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A.T, B.T
        else:
            tensors[f"{name}.lora_b"], tensors[f"{name}.lora_a"] = expert_factors(edits, sites, rank)
    save_tensors(folder / FILE, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "num_layers": spec.layers - first,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    changes = tuple(Change(edit.tensor, "LowRank", edit.norm) for edit in edits.values())
    notes = (f"The names of modules are those of {COMPARED}.",)
    return Lowering("exact", changes, notes, {"rank": rank, "keys": sorted(keys)})


def verify(resolved: Resolved, folder: Path, progress: Progress) -> Comparison:
    """Compare the adapter with the one that the plan gives."""
    return compare_with_lowered(lower, resolved, folder, progress)


def loadable(resolved: Resolved, folder: Path) -> AppliedPlan:
    """The adapter's files, read back as a plan. This shows what they hold, not what an engine makes of them."""
    return AppliedPlan(read_back(folder, resolved))


def load_snippet(place: Place) -> Snippet:
    """By mlx-lm, which takes an adapter from a folder."""
    folder = place.repository.rpartition("/")[2] if place.repository else place.name
    fetch = (f"hf download {place.repository} --local-dir {folder}",) if place.repository else ()
    base, adapter = shlex.quote(place.base_name), shlex.quote(folder)
    run = f"mlx_lm.generate --model {base} --adapter-path {adapter} --prompt 'Why is the sky blue?'"
    return Snippet("console", (*fetch, run), f"The model may be any MLX copy of {place.base.name}, quantised or not.")


def loading_files(folder: Path, names: Sequence[str]) -> set[str]:
    """All files: the target wrote each of them for loading."""
    return set(names)


def read_back(folder: Path, resolved: Resolved) -> EditPlan:
    """The plan that an adapter amounts to in mlx-lm. Raises PlanError for files that mlx-lm would not use so."""
    spec = resolved.spec
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except CheckpointError as error:
        raise PlanError(str(error)) from None
    tensors, _ = load_tensors(folder / FILE)
    modules = _modules(spec, model_kind(resolved.checkpoint))
    try:
        parameters = config["lora_parameters"]
        kind, count, keys = config.get("fine_tune_type", "lora"), int(config["num_layers"]), set(parameters["keys"])
        rank, scale = int(parameters["rank"]), float(parameters["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{folder / ADAPTER_CONFIG} is not the config of an adapter for mlx-lm: {error}") from None
    if kind != "lora":
        raise PlanError(f"{folder / ADAPTER_CONFIG}: fine_tune_type is {kind!r}, expected 'lora'")
    edits = []
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        sites, a, b = modules.get(name), tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if sites is None or a is None or b is None:
            raise PlanError(f"{folder / FILE}: {name} is not a matrix of this model, or half of its pair is missing")
        # of no layers, mlx-lm takes all
        reached = sites[0].layer >= (spec.layers - count if count > 0 else 0)
        if not reached or _key(name, sites[0]) not in keys or b.shape[-1 if b.ndim == 3 else 0] != rank:
            raise PlanError(f"{folder / ADAPTER_CONFIG} leaves {name} out, or gives it another rank")
        pairs = zip(b, a, strict=True) if b.ndim == 3 else [(b.T, a.T)]
        edits += [LowRank(site.matrix, B.contiguous(), A * scale) for site, (B, A) in zip(sites, pairs, strict=True)]
    return EditPlan(resolved.plan.base, tuple(edits))


def model_kind(checkpoint: Checkpoint) -> str:
    """The config's own model type, by which mlx-lm chooses a class. Raises TargetError where none was compared."""
    kind = str(checkpoint.config.get("model_type"))
    if kind not in MODULES:
        raise TargetError(
            f"{COMPARED} has no model for the type {kind!r}, or none that was compared with transformers; compared are "
            f"{', '.join(sorted(MODULES))}. Use --to checkpoint."
        )
    return kind


def module_name(site: Site, kind: str) -> str:
    """mlx-lm's path of a matrix's module."""
    name = site.module
    for theirs, ours in (*MODULES[kind], *((EXPERTS[kind],) if site.expert is not None else ())):
        name = name.replace(theirs, ours, 1)
    return name


def _carried(spec: ModelSpec, kind: str) -> list[Site]:
    """The writers, and the readers that an adapter can carry."""
    apart = (MatrixRole.ROUTER, MatrixRole.UNEMBED)
    single = [site for site in spec.readers if site.expert is None and site.role not in apart]
    return [*spec.sites, *(site for site in single if not _reader_refusal(site, kind))]


def _reader_refusal(site: Site, kind: str) -> str:
    if site.role.writes:
        return ""
    if kind in NO_READERS or _TAKEN_APART in site.tensor:
        return f"a matrix whose module in {COMPARED} is another one, or was not compared"
    return ""


def _modules(spec: ModelSpec, kind: str) -> dict[str, list[Site]]:
    """Every module that an adapter can carry, with its site, or with those of a layer's experts in their order."""
    modules: dict[str, list[Site]] = {}
    for site in _carried(spec, kind):
        if site.expert is None or kind in EXPERTS:
            modules.setdefault(module_name(site, kind), []).append(site)
    return modules


def _key(name: str, site: Site) -> str:
    """The part of a module's path that lies inside its block."""
    return name.partition(f".{site.layer}.")[2]
