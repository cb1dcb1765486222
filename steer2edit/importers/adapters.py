"""PEFT LoRA adapters as plans: ``ΔW = s B A`` on writers and readers, with s = alpha/r, or alpha/√r for rslora."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.checkpoint import Checkpoint, read_json
from steer2edit.errors import CheckpointError, DataError, PlanError, listing
from steer2edit.files.atomic import load_tensors
from steer2edit.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from steer2edit.files.sandbox import TooMuchError, limited
from steer2edit.files.schema import MAYBE, NUMBER, TEXT, check
from steer2edit.importers.source import Importer, described
from steer2edit.plan import Base, Edit, EditPlan, LowRank

# "default" is the name of a single adapter, which some trainers leave in the keys
_PAIR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# the base's own weight, which some trainers save beside the factors
_BASE_LAYER = re.compile(r"(?:base_model\.model\.)?(.+)\.base_layer\.weight")
# settings that make an adapter more than W + s B A, and what each is
_MORE = {
    "use_dora": "DoRA rescales every column of W",
    "modules_to_save": "whole modules are replaced",
    "lora_bias": "a bias is added",
    "layer_replication": "layers are repeated",
    "trainable_token_indices": "rows of the embedding are replaced",
    "target_parameters": "fused parameters are targeted",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "use_qalora": "inputs are pooled",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "a router mixes several adapters",
}

_CONFIG: Any = {
    "r?": (int, None),
    "lora_alpha?": MAYBE,
    "rank_pattern?": ({str: int}, None),
    "alpha_pattern?": ({str: NUMBER}, None),
    "bias?": TEXT,
}
# patterns are a stranger's regular expressions, some of which run for ever
_SECONDS = 30
_PICKLE = "adapter_model.bin"


def read_peft(folder: Path) -> PeftAdapter:
    """The adapter in a folder. Raises DataError where it is more than plain LoRA, with everything that is."""
    try:
        config = read_json(folder / ADAPTER_CONFIG)
        if not (folder / ADAPTER_WEIGHTS).exists() and (folder / _PICKLE).exists():
            raise DataError(
                f"{folder} holds {_PICKLE}, a pickle, which is not read; load it with PEFT and save it again with "
                f"save_pretrained(..., safe_serialization=True), which gives {ADAPTER_WEIGHTS}"
            )
        tensors, _ = load_tensors(folder / ADAPTER_WEIGHTS)
    except (CheckpointError, PlanError) as error:
        raise DataError(str(error)) from None
    try:
        check(config, _CONFIG, ADAPTER_CONFIG)
        with limited(_SECONDS):
            return _plain_lora(folder, config, tensors)
    except (ValueError, TooMuchError, re.error) as error:
        raise DataError(f"{folder / ADAPTER_CONFIG} cannot be used: {error}") from None


def _plain_lora(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PeftAdapter:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: biases are replaced")
    problems += [f"{key} is set: {why}" for key, why in _MORE.items() if config.get(key)]
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    base_layers = {}
    for name, tensor in tensors.items():
        if saved := _BASE_LAYER.fullmatch(name):
            base_layers[saved.group(1)] = tensor
            continue
        match = _PAIR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            problems.append(f"{name} {list(tensor.shape)} is not a matrix lora_A or lora_B")
        else:
            pairs.setdefault(match.group(1), {})[match.group(2)] = tensor.float()
    factors = {}
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["B"].shape[1] != pair["A"].shape[0] or not len(pair["A"]):
            problems.append(f"{module} has not both factors, or they do not fit together")
            continue
        rank = pair["A"].shape[0]
        try:
            scale = _scale(config, module, rank)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise DataError(
                f"{folder / ADAPTER_CONFIG}: r, lora_alpha or their patterns are not understood: {error}"
            ) from None
        if scale is None:
            problems.append(f"{module} has the rank {rank}, its config says r = {_setting(config, 'r', module)}")
        else:
            factors[module] = (pair["B"], pair["A"] * scale)
    if problems or not factors:
        raise DataError(
            f"{folder} is not a plain LoRA adapter, W + s B A:\n{listing(problems or ['it holds no factors'])}"
        )
    base = config.get("base_model_name_or_path")
    source = described(
        folder / ADAPTER_WEIGHTS, "PEFT LoRA adapter", adapter_of=base if isinstance(base, str) else None
    )
    return PeftAdapter(factors, {**source, "name": folder.resolve().name}, base_layers)


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's ``B`` [out, r] and scaled ``A`` [r, in], by module path.

    ``base_layers`` are weights of the base that were saved beside the factors.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    source: Mapping[str, Any]
    base_layers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def plan(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """A low-rank edit for each matrix that the adapter changes. Raises DataError listing all that cannot be edited."""
        single = [site for site in (*spec.sites, *spec.readers) if site.expert is None]
        sites = {name: site for site in single for name in (site.module, site.tensor.removesuffix(".weight")) if name}
        known = {_common_name(name): site for name, site in sites.items()}
        in_parts = {_common_name(one) for site in single for one in _partly(site)}
        edits: list[Edit] = []
        problems = self._changed_base_layers(checkpoint)
        for module, (B, A) in self.factors.items():
            site = sites.get(module) or known.get(_common_name(module))
            if not bool(B.any() and A.any()):
                continue
            if _common_name(module) in in_parts:
                problems.append(f"{module} is a matrix that transformers divides, or holds together with another one")
            elif site is None:
                problems.append(_unknown(module, spec))
            elif (B.shape[0], A.shape[1]) != (site.out_features, site.in_features):
                problems.append(
                    f"{module} is {site.out_features} x {site.in_features}, its update {B.shape[0]} x {A.shape[1]}"
                )
            elif not bool(B.isfinite().all() and A.isfinite().all()):
                problems.append(f"{module} holds NaN or infinity")
            else:
                edits.append(LowRank(site.matrix, B.clone(), A.clone()))
        if problems:
            raise DataError(
                f"{len(problems)} of the adapter's modules cannot be part of a plan, which edits the matrices that write to the "
                f"residual stream and read from it (such as {spec.sites[0].module}):\n{listing(problems)}"
            )
        doubled = [edit.tensor for edit in edits]
        if again := sorted({name for name in doubled if doubled.count(name) > 1}):
            raise DataError(f"the adapter changes a matrix under two names:\n{listing(again)}")
        base = Base.of(checkpoint)
        method = {"name": "imported", **self.source}
        return EditPlan(base, tuple(edits), method=method, data={"name": self.source["name"]})

    def _changed_base_layers(self, checkpoint: Checkpoint) -> list[str]:
        """What is wrong with weights that were saved beside the factors: they must be the base's own."""
        names = {_common_name(name): name for name in checkpoint.tensors}
        problems = []
        for module, tensor in self.base_layers.items():
            name = names.get(_common_name(f"{module}.weight"))
            if name is None and module == "lm_head":
                # tied to the embedding in the base
                name = next((one for one in checkpoint.tensors if one.endswith("embed_tokens.weight")), None)
            ours = None if name is None or tensor.shape != checkpoint.tensors[name].shape else checkpoint.read(name)
            if ours is None or not torch.equal(ours.float(), tensor.float()):
                problems.append(f"{module}.base_layer.weight was saved too, and is not the base's weight")
        return problems


def _partly(site: Site) -> tuple[str, ...]:
    """Modules that hold a part of a site's matrix, or others beside it."""
    return site.modules or ((site.module,) if site.output_part is not None else ())


def _unknown(module: str, spec: ModelSpec) -> str:
    if module.rpartition(".")[2] in ("lm_head", "embed_out") and spec.tied_embeddings:
        return f"{module} is tied to the embedding, and an edit would change both"
    return spec.why_unknown(module)


def _common_name(name: str) -> str:
    """A module's name without the prefixes in which wrappers of the same model differ."""
    return re.sub(r"^(model\.|language_model\.|text_model\.)+", "", name)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """``alpha / r`` (``alpha / √r`` for rslora); None where the config gives another rank."""
    if _setting(config, "r", module) != rank:
        return None
    alpha = float(_setting(config, "lora_alpha", module) or 0.0)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _setting(config: Mapping[str, Any], key: str, module: str) -> Any:
    patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
    for pattern, value in patterns.items():
        # peft's own rule: a pattern is a name, or its end after a dot
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(key, 8)


IMPORTERS = (
    Importer(
        "PEFT LoRA adapters",
        lambda source: source.format == "folder" and (source.path / ADAPTER_CONFIG).is_file(),
        lambda source, _: read_peft(source.path),
    ),
)
