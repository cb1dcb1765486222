"""The files of Steer2Edit's own code (arXiv 2602.09870, github.com/Trustworthy-ML-Lab/Steer2Edit): directions and edit packs.

Directions: ``{"pre" | "post": {"pos_mean" | "neg_mean" | "direction": {"model.layers[N].self_attn.o_proj" |
"model.layers[N].mlp.down_proj": vector}}}``, pre being a writer's input and post its output. Edit packs: ``{"attn": {(layer,
head): {"lambda", "k_hat"}}, "mlp": {(layer, neuron): {"lambda"}}, "meta": {"vhat_attn" | "vhat_mlp": {layer: vector}}}`` with
``ΔW_block = λ v_hat k_hatᵀ`` for a head and ``Δw = λ v_hat`` for a neuron, whose λ has its sign already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.architecture import MatrixRole, ModelSpec
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import DataError, listing
from steer2edit.importers.source import Importer
from steer2edit.plan import Base, EditPlan, LowRank

_WRITER = re.compile(r"model\.layers\[(\d+)\]\.(self_attn\.o_proj|mlp\.down_proj)")
_ROLES = {"self_attn.o_proj": MatrixRole.ATTN_OUT, "mlp.down_proj": MatrixRole.MLP_OUT}


def _is_directions(held: Any) -> bool:
    """Whether a pickle's content is a directions file."""
    return isinstance(held, Mapping) and all(
        isinstance(held.get(side), Mapping) and {"pos_mean", "neg_mean"} <= held[side].keys()
        for side in ("pre", "post")
    )


def _is_edit_pack(held: Any) -> bool:
    """Whether a pickle's content is an edit pack."""
    return isinstance(held, Mapping) and isinstance(held.get("meta"), Mapping) and {"attn", "mlp"} <= held.keys()


def _read_directions(held: Mapping[str, Any], source: Mapping[str, Any]) -> Vectors:
    """Each writer's direction, and its typical input ``(pos_mean + neg_mean) / 2``. Raises DataError for other names."""
    outputs, inputs = held["post"], held["pre"]
    problems: list[str] = []

    def vector(table: Mapping[str, Any], name: str) -> torch.Tensor:
        value = table.get(name)
        if isinstance(value, torch.Tensor) and value.ndim == 1 and bool(value.isfinite().all()):
            return value.float()
        problems.append(f"{name} has no finite vector in every table")
        return torch.zeros(1)

    directions, typical = {}, {}
    for name in outputs["pos_mean"]:
        match = _WRITER.fullmatch(str(name))
        if match is None:
            problems.append(f"{name} is not the name of a writer, such as model.layers[3].mlp.down_proj")
            continue
        key = f"{_ROLES[match.group(2)].value}.{match.group(1)}"
        if "direction" in outputs:
            directions[key] = vector(outputs["direction"], name)
        else:
            directions[key] = vector(outputs["pos_mean"], name) - vector(outputs["neg_mean"], name)
        typical[key] = (vector(inputs["pos_mean"], name) + vector(inputs["neg_mean"], name)) / 2
    if problems or not directions:
        raise DataError(
            f"{source['file']} is not a Steer2Edit directions file:\n{listing(problems or ['it is empty'])}"
        )
    return Vectors(directions, typical, source)


@dataclass(frozen=True)
class EditPack:
    """Finished component edits of Steer2Edit's code; the model gives the widths that the pack does not hold."""

    held: Mapping[str, Any]
    source: Mapping[str, Any]

    def plan(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """One rank-1 edit for each edited writer. Raises DataError listing all that does not fit the model."""
        problems: list[str] = []
        rows: dict[str, torch.Tensor] = {}
        for kind, role in (("attn", MatrixRole.ATTN_OUT), ("mlp", MatrixRole.MLP_OUT)):
            for place, entry in self.held[kind].items():
                try:
                    layer, component = (int(part) for part in place)
                    size = float(entry["lambda"])
                    k_hat = entry["k_hat"].float() if role is MatrixRole.ATTN_OUT else torch.ones(1)
                    site = spec.site(f"{role.value}.{layer}")
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    problems.append(f"{kind} {place}: {error!r}")
                    continue
                width = site.in_features // site.components
                if not 0 <= component < site.components or k_hat.shape != (width,):
                    problems.append(
                        f"{kind} {place}: k_hat {list(k_hat.shape)}; the model has {site.components} components of {width}"
                    )
                    continue
                row = rows.setdefault(site.key, torch.zeros(site.components, width))
                row[component] = size * k_hat
        edits = []
        for site in (site for site in spec.sites if site.key in rows):
            key, row = site.key, rows[site.key]
            table = self.held["meta"].get("vhat_attn" if site.role is MatrixRole.ATTN_OUT else "vhat_mlp", {})
            v_hat = table.get(site.layer) if isinstance(table, Mapping) else None
            if not isinstance(v_hat, torch.Tensor) or v_hat.shape != (site.out_features,):
                problems.append(f"{key}: its v_hat is missing or not of {site.out_features} numbers")
            elif not bool(v_hat.isfinite().all() and row.isfinite().all()):
                problems.append(f"{key} holds NaN or infinity")
            else:
                edits.append(LowRank(site.matrix, v_hat.float()[:, None].clone(), row.reshape(1, -1)))
        if problems:
            raise DataError(f"{self.source['file']} does not fit {checkpoint.name}:\n{listing(problems)}")
        meta = {name: self.held["meta"][name] for name in ("rho_attn", "rho_mlp", "alpha") if name in self.held["meta"]}
        method = {"name": "imported", **self.source, **{name: float(value) for name, value in meta.items()}}
        base = Base.of(checkpoint)
        return EditPlan(base, tuple(edits), method=method, data={"name": self.source["name"]})


IMPORTERS = (
    Importer(
        "Steer2Edit's direction files",
        lambda source: source.format == "torch" and _is_directions(source.content),
        lambda source, _: _read_directions(source.content, source.described("Steer2Edit directions")),
    ),
    Importer(
        "Steer2Edit's edit packs",
        lambda source: source.format == "torch" and _is_edit_pack(source.content),
        lambda source, _: EditPack(source.content, source.described("Steer2Edit edit pack")),
    ),
)
