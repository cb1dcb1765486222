"""The intermediate representation: an ordered list of edits to named tensors, with provenance.

A plan says what changes in the mathematics' orientation (``y = W x``, W output × input); how a file stores W is the
targets' affair. Plans are values: scaling or merging gives a new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer2edit.errors import PlanError, listing, shown
from steer2edit.files.atomic import load_tensors, save_tensors
from steer2edit.files.schema import NUMBER, TEXT, check
from steer2edit.files.untrusted import parse_json
from steer2edit.plan.content import content_of
from steer2edit.plan.measured import LARGEST_STRENGTH, MEASURED, Measured
from steer2edit.plan.operations import Edit, edit_tensors, read_edit
from steer2edit.plan.scores import TABLE, Scores, read_scores

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.checkpoint import Checkpoint

FORMAT = "steer2edit.plan.1"
METHOD: Any = {"name?": TEXT, "plans?": [{"name?": TEXT, "method": lambda: METHOD, "weight": NUMBER, "plan": str}]}
BASE: Any = {"name": str, "revision": TEXT, "fingerprint": str}
DATA: Any = {
    **{"name?": TEXT, "data?": TEXT, "system?": TEXT, "span?": TEXT, "background?": TEXT},
    "prompts?": ([str], None),  # None: statistics of older versions name none
    **{"metric?": ({"name": str, "goal": str}, None), "origin?": ([{"kind": str}], None)},
    "quantised?": {
        "format": str,
        "weights": ({"name": str, "revision": TEXT, "fingerprint": str, "largest_difference": NUMBER}, None),
        "captured_on?": BASE,
    },
}
_DESCRIBED: Any = {
    "base": BASE,
    "edits": [{"tensor": str, "op": str}],
    "scored": [str],
    "method": METHOD,
    "measured": MEASURED,
    "structure?": {"remove": {str: [int]}, "top_k": (int, None), "layers?": [int]},
    "content?": {str: str},
    "data": DATA,
}


@dataclass(frozen=True)
class Base:
    """The checkpoint that a plan was made for."""

    name: str
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Base:
        """The base that a checkpoint is."""
        return cls(checkpoint.name, checkpoint.revision, checkpoint.fingerprint)


@dataclass(frozen=True)
class Structure:
    """Changes of the architecture: experts removed, by layer, how many each token passes through, and ``layers`` removed.

    Edits count the experts and layers as the base does: what is removed is removed last.
    """

    remove: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    top_k: int | None = None
    layers: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.removes or self.top_k is not None

    @property
    def removes(self) -> bool:
        """Whether tensors go, or lose a part."""
        return bool(self.remove or self.layers)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        removed = {str(layer): list(gone) for layer, gone in self.remove.items()}
        layers = {"layers": list(self.layers)} if self.layers else {}
        return {"remove": removed, "top_k": self.top_k, **layers}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Structure:
        """What :meth:`described` gave. Raises ValueError for anything else."""
        remove = {int(layer): tuple(gone) for layer, gone in described["remove"].items()}
        numbers = [n for gone in remove.values() for n in gone]
        if any(type(n) is not int or n < 0 for n in [*remove, *numbers]) or any(
            not gone or len(set(gone)) < len(gone) for gone in remove.values()
        ):
            raise ValueError("its removed experts are not lists of different numbers")
        top_k = described["top_k"]
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"its experts per token are {top_k!r}")
        layers = tuple(described.get("layers", ()))
        if any(type(n) is not int or n < 0 for n in layers) or list(layers) != sorted(set(layers)):
            raise ValueError("its removed layers are not different numbers in order")
        return cls(remove, top_k, layers)


@dataclass(frozen=True)
class EditPlan:
    """Edits in order, one for each tensor, with the scores behind them.

    ``method`` holds its name and parameters, ``measured`` what running the model showed (KL, strength), ``data`` the contrast
    data's description. ``content`` is the SHA-256 of the base's bytes of each edited matrix, by the edit's tensor; plans from
    before it was recorded have none.
    """

    base: Base
    edits: tuple[Edit, ...]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    data: Mapping[str, Any] = field(default_factory=dict)
    structure: Structure = Structure()
    content: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [edit.tensor for edit in self.edits]
        if len(set(names)) != len(names):
            raise PlanError(
                f"a plan holds one edit for each tensor; repeated: {sorted({n for n in names if names.count(n) > 1})}"
            )

    def edit_of(self, tensor: str) -> Edit | None:
        """The edit of a tensor, or None."""
        return next((edit for edit in self.edits if edit.tensor == tensor), None)

    @property
    def seen(self) -> tuple[str, ...]:
        """Digests of the prompts that the plan was made from or chosen by; nothing may be reported on them."""
        return tuple(sorted({*(self.data.get("prompts") or ()), *self.measured.selected_on}))

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together whose size the plan knows."""
        return float(sum((edit.norm or 0.0) ** 2 for edit in self.edits) ** 0.5)

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raise PlanError unless the plan was made for this checkpoint."""
        if self.base.fingerprint != checkpoint.fingerprint:
            raise PlanError(
                f"the plan was made for {self.base.name} (fingerprint {self.base.fingerprint[:12]}), but {checkpoint.name} "
                f"has the fingerprint {checkpoint.fingerprint[:12]}; a plan fits only the weights it was computed from"
            )

    def moved_to(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """The plan for ``checkpoint``, where that is the unquantised model whose matrices it was computed from; else the same."""
        weights = (self.data.get("quantised") or {}).get("weights") or {}
        if weights.get("fingerprint") != checkpoint.fingerprint or self.base.fingerprint == checkpoint.fingerprint:
            return self
        data = {**self.data, "quantised": {**self.data["quantised"], "captured_on": vars(self.base)}}
        return replace(self, base=Base.of(checkpoint), data=data, content={}).computed_from(checkpoint, spec)

    def computed_from(self, checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
        """The plan with the content of the matrices that it edits recorded, each of which is read."""
        return replace(self, content=content_of(checkpoint, spec, [edit.tensor for edit in self.edits]))

    def check_content(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Raise PlanError unless the edited matrices hold what they held when the plan was made. Reads each of them."""
        names = [edit.tensor for edit in self.edits if edit.tensor in self.content]
        now = content_of(checkpoint, spec, names)
        if changed := [name for name, digest in now.items() if digest != self.content[name]]:
            raise PlanError(
                f"the plan was made for {self.base.name}; {checkpoint.name} has the same fingerprint, and other values in "
                f"{len(changed)} of the {len(names)} matrices that the plan edits:\n{listing(changed)}\n"
                "A plan fits only the weights it was computed from: give that revision, or make the plan anew."
            )

    def scaled(self, factor: float) -> EditPlan:
        """The same plan with every edit, and every lam, ``factor`` times as strong."""
        scores = {key: replace(table, lam=table.lam * factor) for key, table in self.scores.items()}
        return replace(self, edits=tuple(edit.scaled(factor) for edit in self.edits), scores=scores)

    def at_strength(self, strength: float, scaled: Callable[[EditPlan, float], EditPlan] | None = None) -> EditPlan:
        """The plan at ``strength`` times its present strength, recorded in ``measured``.

        ``scaled`` stands for :meth:`scaled` where a method has another one. Raises PlanError for strengths that are not finite,
        or beyond ``LARGEST_STRENGTH``.
        """
        total = strength * (1.0 if self.measured.strength is None else self.measured.strength)
        check_strength(strength)
        check_strength(total)
        return replace((scaled or EditPlan.scaled)(self, strength), measured=replace(self.measured, strength=total))

    def reweighted(self, tensors: Mapping[str, float], keys: Mapping[str, float]) -> EditPlan:
        """Multiply each tensor's edit, and each site's lam, by its own factor.

        The factor is 1 where there is none. Edits by 0 are left out.
        """
        edits = (edit.scaled(tensors.get(edit.tensor, 1.0)) for edit in self.edits if tensors.get(edit.tensor, 1.0))
        scores = {key: replace(table, lam=table.lam * keys.get(key, 1.0)) for key, table in self.scores.items()}
        return replace(self, edits=tuple(edits), scores=scores)

    @property
    def hash(self) -> str:
        """SHA-256 of everything the plan says."""
        tensors, described = self._parts()
        digest = hashlib.sha256(described.encode())
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write ``*.plan.safetensors``."""
        tensors, described = self._parts()
        save_tensors(Path(path), tensors, {"plan": described})

    def _parts(self) -> tuple[dict[str, torch.Tensor], str]:
        tensors = {name: value for edit in self.edits for name, value in edit_tensors(edit).items()}
        for key, table in self.scores.items():
            values = ((f"{key}.{name}", getattr(table, name)) for name in TABLE)
            tensors |= {name: value for name, value in values if value is not None}
        described = {
            "format": FORMAT,
            "base": vars(self.base),
            "edits": [{"tensor": edit.tensor, "op": edit.op} for edit in self.edits],
            "scored": list(self.scores),
            "method": dict(self.method),
            "measured": self.measured.to_json(),
            "data": dict(self.data),
            **({"structure": self.structure.described()} if self.structure else {}),
            **({"content": dict(self.content)} if self.content else {}),
        }
        return tensors, json.dumps(described)

    @classmethod
    def load(cls, path: str | Path) -> EditPlan:
        """Read what :meth:`save` wrote. Raises PlanError for any other file, and for factors that do not fit."""
        tensors, metadata = load_tensors(Path(path))
        try:
            described = parse_json(metadata["plan"].encode(), unique=True)
            if described["format"] != FORMAT:
                raise PlanError(f"{path} has the format {shown(described['format'])}, expected {FORMAT!r}")
            check(described, _DESCRIBED, "the plan")
            edits = tuple(read_edit(entry, tensors) for entry in described["edits"])
            scores = {key: read_scores(key, tensors) for key in described["scored"]}
            base = Base(**described["base"])
            structure = Structure.read(described["structure"]) if "structure" in described else Structure()
            method, data = described["method"], described["data"]
            measured = Measured.from_json(described["measured"])
            content = _content(described.get("content", {}))
            return cls(base, edits, scores, method, measured, data, structure, content)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise PlanError(f"{path} is not a plan of steer2edit: {reason}") from None


def check_strength(strength: float, name: str = "the strength") -> None:
    """Raise PlanError unless a strength is finite and at most ``LARGEST_STRENGTH`` in size."""
    if not abs(strength) <= LARGEST_STRENGTH:
        raise PlanError(f"{name} is {strength:g}; expected a finite number of at most {LARGEST_STRENGTH:g} in size")


def _content(digests: Mapping[str, str]) -> Mapping[str, str]:
    if strange := [digest for digest in digests.values() if not re.fullmatch("[0-9a-f]{64}", digest)]:
        raise ValueError(f"its content holds {shown(strange[0])}, expected SHA-256 digests")
    return digests
