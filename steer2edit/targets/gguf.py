"""The GGUF target: a LoRA adapter for llama.cpp that is exactly the plan's low-rank update.

It works with any GGUF of the base, quantised or not (``llama-server -m base.gguf --lora adapter.gguf``). GGUF holds every
matrix as output × input, whatever the base's own files do, so B and A are written unchanged. ``adapter.lora.alpha`` is the rank.
llama.cpp multiplies by alpha / rank, so a user's ``--lora-scaled`` of 1 is the plan's own strength. A layer's routed experts are
one tensor of three dimensions there, and so are their factors: ``lora_a`` [experts, r, in] and ``lora_b`` [experts, out, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.checkpoint.gguf import Fields, library, read_gguf, write_gguf
from steer2edit.errors import PlanError, TargetError, listing
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
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.progress import Progress

SUMMARY = "A LoRA adapter for llama.cpp, for any GGUF of the base."
HUB = HubEntry(
    "A LoRA adapter for llama.cpp with a steering vector compiled into its weights by steer2edit: no training, no hooks, no "
    "changed architecture.",
    "adapter",
    "gguf",
    ("lora", "gguf"),
)
WHOLE_MODEL = False
STRUCTURE = False
FILE = "adapter.gguf"

# llama.cpp's architecture of each model type: what its converter gives the base, which an adapter has to repeat
ARCHITECTURES: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral"), "llama"),
    **{"ministral3": "mistral3", "qwen2": "qwen2", "qwen3": "qwen3", "phi": "phi2", "phi3": "phi3"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma4_text": "gemma4"},
    **{"olmo": "olmo", "granite": "granite"},
    **dict.fromkeys(("olmo2", "olmo3"), "olmo2"),
    **{"smollm3": "smollm3", "cohere": "command-r", "cohere2": "cohere2", "nemotron": "nemotron"},
    **{"stablelm": "stablelm", "ernie4_5": "ernie4_5", "hunyuan_v1_dense": "hunyuan-dense", "arcee": "arcee"},
    **{"apertus": "apertus", "seed_oss": "seed_oss", "glm": "chatglm", "glm4": "glm4", "minicpm3": "minicpm3"},
    **{"exaone4": "exaone4", "starcoder2": "starcoder2", "gpt_neox": "gptneox", "gpt2": "gpt2"},
    **{"gpt_bigcode": "starcoder", "bloom": "bloom", "falcon": "falcon", "mpt": "mpt", "jais2": "jais2"},
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), "qwen2vl"),
    "qwen3_vl_text": "qwen3vl",
    # mixtures
    **{
        "mixtral": "llama",
        "qwen2_moe": "qwen2moe",
        "qwen3_moe": "qwen3moe",
        "olmoe": "olmoe",
        "granitemoe": "granitemoe",
    },
    **{"gpt_oss": "gpt-oss", "glm4_moe": "glm4moe", "dots1": "dots1", "ernie4_5_moe": "ernie4_5-moe"},
    **{"hunyuan_v1_moe": "hunyuan-moe", "exaone_moe": "exaone-moe"},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "deepseek2"),
}

EXPERTS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "glm4_moe", "dots1", "ernie4_5_moe"),
    *("hunyuan_v1_moe", "exaone_moe", "deepseek_v2", "deepseek_v3"),
)
"""Model types whose experts' edits were run in llama.cpp, and had the plan's numbers there (docs/engines.md)."""

READERS = (
    *("apertus", "arcee", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4"),
    *("gpt_bigcode", "granite", "hunyuan_v1_dense", "jais2", "llama", "minicpm3", "mistral", "nemotron", "olmo"),
    *("olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
    *("qwen3", "qwen3_vl_text", "seed_oss", "smollm3", "stablelm", "starcoder2"),
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "gpt_oss", "granitemoe"),
    *("mixtral", "olmoe"),
)
"""Model types whose readers llama.cpp's converter was seen to keep as they are, up to the order of rows (docs/engines.md)."""
REORDERED = ("arcee", "granite", "granitemoe", "llama", "mistral", "mixtral", "olmo", "smollm3")
"""Of them those whose query and key rows it brings into another order: of each head, row i and row i + d/2 become neighbours."""
_NOT_ADAPTED = (MatrixRole.ROUTER, MatrixRole.UNEMBED)
# the converter makes two tensors of it
_TAKEN_APART = {"deepseek_v2": "kv_b_proj", "deepseek_v3": "kv_b_proj"}


def check(resolved: Resolved) -> None:
    """Raise TargetError for edits and families that no GGUF adapter can carry."""
    spec = resolved.spec
    if not resolved.edits:
        raise TargetError("the plan is empty; there is nothing for an adapter to carry")
    refused = [
        f"{name}: {why}"
        for name, one in resolved.edits.items()
        if (why := adapter_refusal(*one, experts=spec.model_type in EXPERTS) or _reader_refusal(spec, one[1]))
    ]
    if refused:
        raise TargetError(
            f"a GGUF adapter carries low-rank edits of matrices, and none of these:\n{listing(refused)}\n"
            "Use --to checkpoint, and convert that."
        )
    tensor_names(spec, architecture_of(spec))


def lower(resolved: Resolved, folder: Path, writing: Writing, progress: Progress) -> Lowering:
    """Write ``adapter.gguf`` into ``folder``. Raises TargetError for edits and families that no GGUF adapter can carry."""
    check(resolved)
    spec = resolved.spec
    architecture = architecture_of(spec)
    edits = low_rank_forms(resolved)
    rank = max(edit.B.shape[1] for edit in edits.values())
    tensors: dict[str, torch.Tensor] = {}
    for name, sites in _tensors(spec, architecture).items():
        if not any(site.key in edits for site in sites):
            continue
        stacked = sites[0].expert is not None
        B, A = expert_factors(edits, sites, rank) if stacked else writer_factors(edits[sites[0].key], sites[0], rank)
        order = row_order(spec, sites[0])
        B = B if order is None else B[order].contiguous()
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A, B
    fields: Fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(rank)}
    write_gguf(folder / FILE, architecture, tensors, fields)
    changes = tuple(Change(edit.tensor, "LowRank", edit.norm) for edit in edits.values())
    notes = (f"For GGUF files of the base, whose general.architecture is {architecture}.",)
    return Lowering("exact", changes, notes, {"rank": rank, "architecture": architecture, "files": [FILE]})


def verify(resolved: Resolved, folder: Path, progress: Progress) -> Comparison:
    """Compare the adapter with the one that the plan gives."""
    return compare_with_lowered(lower, resolved, folder, progress)


def loadable(resolved: Resolved, folder: Path) -> AppliedPlan:
    """The adapter's file, read back as a plan. This shows what the file holds, not what an engine makes of it."""
    return AppliedPlan(read_back(folder / FILE, resolved.plan.base, resolved.spec))


def load_snippet(place: Place) -> Snippet:
    """By llama.cpp."""
    fetch = (f"hf download {place.repository} {FILE} --local-dir .",) if place.repository else ()
    remark = f"base.gguf is any GGUF of {place.base.name}."
    return Snippet("console", (*fetch, f"llama-server -m base.gguf --lora {place.file(FILE)}"), remark)


def loading_files(folder: Path, names: Sequence[str]) -> set[str]:
    """All files: the target wrote each of them for loading."""
    return set(names)


def read_back(path: Path, base: Base, spec: ModelSpec) -> EditPlan:
    """The plan that an adapter's file amounts to when llama.cpp adds it at scale 1. Raises PlanError for other files."""
    fields, tensors = read_gguf(path)
    architecture = architecture_of(spec)
    expected = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    wrong = [
        f"{key} is {fields.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if fields.get(key) != value
    ]
    if wrong:
        raise PlanError(f"{path} is not this base's adapter:\n{listing(wrong)}")
    writers = _tensors(spec, architecture)
    edits = []
    for name in sorted({name.rsplit(".", 1)[0] for name in tensors}):
        A, B = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if name not in writers or A is None or B is None:
            raise PlanError(f"{path}: {name} is not a matrix of this model, or half of its pair is missing")
        # alpha 0 stands for "no alpha" in llama.cpp
        alpha = float(fields.get("adapter.lora.alpha", 0.0))
        scale = alpha / B.shape[-1] if alpha else 1.0
        sites = writers[name]
        order = row_order(spec, sites[0])
        B = B if order is None else B[order.argsort()]
        if sites[0].expert is None:
            A, B = A[None], B[None]
        if not len(A) == len(B) == len(sites):
            raise PlanError(f"{path}: {name} has factors of {len(A)} experts, expected {len(sites)}")
        edits += [LowRank(site.matrix, b, a * scale) for site, b, a in zip(sites, B, A, strict=True)]
    return EditPlan(base, tuple(edits))


def architecture_of(spec: ModelSpec) -> str:
    """llama.cpp's name for a model's family. Raises TargetError where it has none that this version knows."""
    if spec.model_type not in ARCHITECTURES:
        raise TargetError(
            f"llama.cpp's architecture for the model type {spec.model_type!r} is not known to this version; known are "
            f"{', '.join(sorted(ARCHITECTURES))}. Use --to lora, or --to checkpoint and llama.cpp's converter."
        )
    return ARCHITECTURES[spec.model_type]


def row_order(spec: ModelSpec, site: Site) -> torch.Tensor | None:
    """The rows of a matrix, int64, in the order that llama.cpp's converter gives them; None where it keeps their order."""
    if spec.model_type not in REORDERED or site.role not in (MatrixRole.Q, MatrixRole.K):
        return None
    heads = next(one.heads for one in spec.sites if one.layer == site.layer and one.heads is not None)
    queries = next(one for one in spec.readers if one.layer == site.layer and one.role is MatrixRole.Q)
    width = queries.out_features // heads
    return torch.arange(site.out_features).view(-1, 2, width // 2).transpose(1, 2).reshape(-1)


def _reader_refusal(spec: ModelSpec, site: Site) -> str:
    if site.role.writes:
        return ""
    if spec.model_type not in READERS or _TAKEN_APART.get(spec.model_type, "-") in site.tensor:
        return "a matrix that llama.cpp's converter changes, or may change, in this model type"
    return ""


def tensor_names(spec: ModelSpec, architecture: str) -> dict[str, str]:
    """GGUF's name of each matrix that an adapter can carry, by site key, from the gguf library's own tables.

    A layer's experts have one name.
    """
    gguf = library()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise TargetError(f"the installed gguf library does not know the architecture {architecture}; upgrade it")
    table = gguf.get_tensor_name_map(kinds[architecture], spec.layers)
    names: dict[str, str] = {}
    single = [site for site in spec.readers if site.expert is None and site.role not in _NOT_ADAPTED]
    readers = [site for site in single if not _reader_refusal(spec, site)]
    for site in (*spec.sites, *readers):
        if site.expert is not None:
            if spec.model_type in EXPERTS:
                names[site.key] = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_DOWN_EXP].format(bid=site.layer)}.weight"
            continue
        # inside a multimodal model the language model's modules lie one level deeper; converters leave that level out
        module = site.module.replace("model.language_model.", "model.", 1)
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise TargetError(f"gguf's table for {architecture} has no name for {module}")
        names[site.key] = name
    return names


def _tensors(spec: ModelSpec, architecture: str) -> dict[str, list[Site]]:
    """Every tensor that an adapter can carry, with its site, or with those of a layer's experts in their order."""
    tensors: dict[str, list[Site]] = {}
    for key, name in tensor_names(spec, architecture).items():
        tensors.setdefault(name, []).append(spec.site(key))
    return tensors
