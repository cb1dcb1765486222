"""The operations of a plan, each on one matrix or vector.

They are in the mathematics' orientation: ``y = W x``, W output × input.

An operation knows how it is written into a plan's file, as ``parts``: tensors beside its tensor's name; whether it ``fits``
a matrix [out, in] or a vector [out]; and how to ``apply`` itself, in place, to a block of rows of the stored tensor that
begins at row ``first``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from steer2edit.errors import PlanError


@dataclass(frozen=True)
class LowRank:
    """``W + B A``: ``B`` is [out, r], ``A`` is [r, in], float32.

    ``mean_effect`` [r] is ``A`` times the mean input of the data behind the plan, where that is known. ``B mean_effect`` is
    the edit's constant part (``scoring.mean_effect.record_mean_effect``). A plan's file stores it as ``push``.
    """

    op: ClassVar[str] = "low_rank"
    tensor: str
    B: torch.Tensor
    A: torch.Tensor
    mean_effect: torch.Tensor | None = None

    def scaled(self, factor: float) -> LowRank:
        return replace(
            self, A=self.A * factor, mean_effect=None if self.mean_effect is None else self.mean_effect * factor
        )

    def dense(self) -> torch.Tensor:
        """The update itself, [out, in]."""
        return self.B @ self.A

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same update as ``B`` [out, rank] and ``A`` [rank, in] of like magnitude, filled up with zeros."""
        B, A = torch.zeros(self.B.shape[0], rank), torch.zeros(rank, self.A.shape[1])
        # the magnitude is shared between both factors by a power of two, which rounds nothing
        ratio = self.A.norm(dim=1) / self.B.norm(dim=0).clamp(min=1e-30)
        share = torch.exp2((ratio.clamp(min=1e-30).log2() / 2).round())
        B[:, : self.B.shape[1]] = self.B * share
        A[: self.A.shape[0]] = self.A / share[:, None]
        return B, A

    @property
    def norm(self) -> float:
        """Frobenius norm of the update, without forming it."""
        gram = (self.B.double().T @ self.B.double()) * (self.A.double() @ self.A.double().T)
        return float(gram.sum().clamp(min=0).sqrt())

    def parts(self) -> dict[str, torch.Tensor]:
        return {"B": self.B, "A": self.A, **({} if self.mean_effect is None else {"push": self.mean_effect})}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return (self.B.shape[0], self.A.shape[1]) == shape

    def apply(self, block: torch.Tensor, first: int, out_in: bool) -> None:
        rows = slice(first, first + len(block))
        left, right = (self.B, self.A) if out_in else (self.A.T, self.B.T)
        block.addmm_(left[rows].to(block.dtype), right.to(block.dtype))

    @classmethod
    def read(cls, entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> LowRank:
        B, A, mean_effect = parts["B"], parts["A"], parts.get("push")
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(f"B is {list(B.shape)} and A {list(A.shape)}")
        if A.shape[0] > max(min(B.shape[0], A.shape[1]), 1):
            raise ValueError(
                f"its rank is {A.shape[0]}; a matrix of {B.shape[0]} x {A.shape[1]} has no update of that rank"
            )
        if mean_effect is not None and mean_effect.shape != A.shape[:1]:
            raise ValueError(f"A is {list(A.shape)} and its push {list(mean_effect.shape)}")
        return cls(entry["tensor"], B, A, mean_effect)


@dataclass(frozen=True)
class Bias:
    """``b + delta`` on a bias that the model already has: ``delta`` is [out], float32."""

    op: ClassVar[str] = "bias"
    tensor: str
    delta: torch.Tensor

    def scaled(self, factor: float) -> Bias:
        return replace(self, delta=self.delta * factor)

    @property
    def norm(self) -> float:
        return float(self.delta.double().norm())

    def parts(self) -> dict[str, torch.Tensor]:
        return {"bias": self.delta}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.delta.shape == shape

    def apply(self, block: torch.Tensor, first: int, out_in: bool) -> None:
        block += self.delta[first : first + len(block)]

    @classmethod
    def read(cls, entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> Bias:
        if parts["bias"].ndim != 1:
            raise ValueError(f"its bias is {list(parts['bias'].shape)}, expected a vector")
        return cls(entry["tensor"], parts["bias"])


@dataclass(frozen=True)
class Scale:
    """``factor · W``, or ``factor · b``: the gain of an expert; 0 silences it. It has no strength of its own."""

    op: ClassVar[str] = "scale"
    tensor: str
    factor: float

    def scaled(self, factor: float) -> Scale:
        return self

    @property
    def norm(self) -> None:
        """Not known from the plan alone."""

    def parts(self) -> dict[str, torch.Tensor]:
        return {"scale": torch.tensor([self.factor], dtype=torch.float64)}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return True

    def apply(self, block: torch.Tensor, first: int, out_in: bool) -> None:
        block *= self.factor

    @classmethod
    def read(cls, entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> Scale:
        if parts["scale"].shape != (1,):
            raise ValueError(f"its factor is {list(parts['scale'].shape)}, expected one number")
        return cls(entry["tensor"], float(parts["scale"]))


@dataclass(frozen=True)
class Assign:
    """Rows of a matrix, or entries of a vector, take the ``values`` [rows, in] or [rows], float32.

    A router's row or an entry of its selection bias is set so, whatever it was; it has no strength of its own.
    """

    op: ClassVar[str] = "assign"
    tensor: str
    rows: tuple[int, ...]
    values: torch.Tensor

    def scaled(self, factor: float) -> Assign:
        return self

    @property
    def norm(self) -> None:
        """Not known from the plan alone."""

    def parts(self) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(self.rows, dtype=torch.int64), "values": self.values}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return max(self.rows) < shape[0] and self.values.shape[1:] == shape[1:]

    def apply(self, block: torch.Tensor, first: int, out_in: bool) -> None:
        for row, value in zip(self.rows, self.values, strict=True):
            if first <= row < first + len(block):
                block[row - first] = value

    @classmethod
    def read(cls, entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> Assign:
        rows, values = parts["rows"], parts["values"]
        if rows.ndim != 1 or not len(rows) or values.ndim not in (1, 2) or len(values) != len(rows):
            raise ValueError(f"its rows are {list(rows.shape)} and their values {list(values.shape)}")
        if int(rows.min()) < 0 or len(set(rows.tolist())) != len(rows):
            raise ValueError("its rows are negative or named twice")
        return cls(entry["tensor"], tuple(rows.tolist()), values)


Edit = LowRank | Bias | Scale | Assign
OPS: Mapping[str, type[LowRank] | type[Bias] | type[Scale] | type[Assign]] = {
    kind.op: kind for kind in (LowRank, Bias, Scale, Assign)
}
_DTYPES = {"rows": torch.int64, "scale": torch.float64}


def edit_tensors(edit: Edit) -> dict[str, torch.Tensor]:
    """What a plan's file holds of an edit: tensors called ``<tensor>.<part>``."""
    return {f"{edit.tensor}.{part}": value for part, value in edit.parts().items()}


def read_edit(entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Edit:
    """The edit that ``{"tensor", "op"}`` and a plan's tensors describe. Raises PlanError where they are not sound."""
    name = entry["tensor"]
    kind = OPS.get(entry["op"])
    if kind is None:
        raise PlanError(f"the plan holds the unknown operation {entry['op']!r} on {name}")
    parts = {
        part: tensors[f"{name}.{part}"]
        for part in ("B", "A", "push", "bias", "scale", "rows", "values")
        if f"{name}.{part}" in tensors
    }
    for part, value in parts.items():
        dtype = _DTYPES.get(part, torch.float32)
        if value.dtype != dtype or not bool(value.isfinite().all()):
            raise PlanError(
                f"the plan's {part} for {name} is not {str(dtype).removeprefix('torch.')}, or is not finite"
            )
    try:
        return kind.read(entry, parts)
    except ValueError as error:
        raise PlanError(f"the plan's factors for {name} do not fit together: {error}") from None


def added(first: Edit, second: Edit) -> Edit:
    """Both edits of one tensor as one. Raises PlanError where the operations do not add up."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        known = first.mean_effect is not None and second.mean_effect is not None
        mean_effect = torch.cat((first.mean_effect, second.mean_effect)) if known else None  # type: ignore[arg-type]
        return LowRank(first.tensor, torch.cat((first.B, second.B), dim=1), torch.cat((first.A, second.A)), mean_effect)
    if isinstance(first, Bias) and isinstance(second, Bias):
        return Bias(first.tensor, first.delta + second.delta)
    if isinstance(first, Scale) and isinstance(second, Scale):
        return Scale(first.tensor, first.factor * second.factor)
    if isinstance(first, Assign) and isinstance(second, Assign):
        return _both_assigned(first, second)
    raise PlanError(f"the plans edit {first.tensor} by different operations ({first.op}, {second.op})")


def _both_assigned(first: Assign, second: Assign) -> Assign:
    values = dict(zip(first.rows, first.values, strict=True))
    for row, value in zip(second.rows, second.values, strict=True):
        if row in values and not torch.equal(values[row], value):
            raise PlanError(f"the plans set row {row} of {first.tensor} to different values")
        values[row] = value
    return Assign(first.tensor, tuple(values), torch.stack(list(values.values())))
