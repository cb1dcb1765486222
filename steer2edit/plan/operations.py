"""The operations of a plan, each on one matrix or vector.

They are in the mathematics' orientation: ``y = W x``, W output × input.

An operation knows how it is written into a plan's file, as ``parts``: tensors beside its tensor's name; whether it ``fits``
a matrix [out, in] or a vector [out]; and how to ``apply`` itself, in place, to a block of rows of the stored tensor that
begins at row ``first``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

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

    def compressed(self) -> LowRank | None:
        """The same update at its numerical rank, or None where nothing is left of it.

        By QR and a small SVD in float64. Singular values under float32's rounding of the factors are left out.
        """
        left, right = torch.linalg.qr(self.B.double()), torch.linalg.qr(self.A.double().T)
        U, S, Vh = torch.linalg.svd(left.R @ right.R.T)
        sizes = self.B.double().norm(dim=0) * self.A.double().norm(dim=1)
        rounding = float(sizes.square().sum().sqrt()) * torch.finfo(torch.float32).eps
        rank = int(S.gt(rounding).sum())
        if not rank:
            return None
        root = S[:rank].sqrt()
        B, A = (left.Q @ U[:, :rank]) * root, (root[:, None] * Vh[:rank]) @ right.Q.T
        effect = self.mean_effect
        if effect is not None:
            effect = (U[:, :rank].T @ left.R @ effect.double() / root).float()
        return LowRank(self.tensor, B.float(), A.float(), effect)

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
class NewBias(Bias):
    """A bias that the base lacks, so that ``delta`` [out], float32, is all of it: a bias of zeros, edited.

    ``tensor`` is the name that the bias gets. A setting of config.json has to create it (``architecture.carriers``).
    """

    op: ClassVar[str] = "new_bias"


Axis = Literal["whole", "rows", "columns"]
_SCALE_PARTS: Mapping[Axis, str] = {"whole": "scale", "rows": "row_scale", "columns": "column_scale"}


@dataclass(frozen=True)
class Scale:
    """Rows, columns or the whole of a matrix or bias, multiplied by ``factors``, float64.

    ``whole`` has one factor: the gain of an expert, where 0 silences it. It has no strength of its own. ``rows`` has one for each
    output, ``diag(factors) W`` or ``factors * b``; ``columns`` one for each input, ``W diag(factors)``. At strength s a factor f
    of these two is ``1 + s (f - 1)``: 0 is the base, and 1 the plan.
    """

    op: ClassVar[str] = "scale"
    tensor: str
    factors: torch.Tensor
    axis: Axis = "whole"

    @classmethod
    def whole(cls, tensor: str, factor: float) -> Scale:
        """One factor for all of a tensor."""
        return cls(tensor, torch.tensor([factor], dtype=torch.float64))

    def scaled(self, factor: float) -> Scale:
        return self if self.axis == "whole" else replace(self, factors=1 + factor * (self.factors - 1))

    @property
    def changed(self) -> torch.Tensor:
        """The numbers of the rows or columns whose factor is not 1."""
        return (self.factors != 1).nonzero()[:, 0]

    @property
    def norm(self) -> None:
        """Not known from the plan alone."""

    def parts(self) -> dict[str, torch.Tensor]:
        return {_SCALE_PARTS[self.axis]: self.factors}

    def fits(self, shape: tuple[int, ...]) -> bool:
        if self.axis == "columns":
            return len(shape) == 2 and len(self.factors) == shape[1]
        return self.axis == "whole" or len(self.factors) == shape[0]

    def apply(self, block: torch.Tensor, first: int, out_in: bool) -> None:
        if self.axis == "whole":
            block *= float(self.factors)
            return
        factors = self.factors.to(block.dtype)
        if block.ndim == 1 or (self.axis == "rows") == out_in:
            factors = factors[first : first + len(block)]
            block *= factors if block.ndim == 1 else factors[:, None]
        else:
            block *= factors

    @classmethod
    def read(cls, entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> Scale:
        scales = _read_scales(entry, parts)
        if len(scales) != 1:
            raise ValueError(f"it has factors of {len(scales)} kinds, expected one")
        return scales[0]


def _read_scales(entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> tuple[Scale, ...]:
    scales = tuple(Scale(entry["tensor"], parts[name], axis) for axis, name in _SCALE_PARTS.items() if name in parts)
    for one in scales:
        if one.factors.ndim != 1 or not len(one.factors) or (one.axis == "whole" and len(one.factors) != 1):
            expected = "one number" if one.axis == "whole" else "a vector"
            raise ValueError(f"its factor is {list(one.factors.shape)}, expected {expected}")
    return scales


@dataclass(frozen=True)
class ScaleAdd:
    """``R W C + B A``, or ``r b + delta``: a tensor scaled, and then added to.

    ``scales`` has at most one scale for each axis. What is ``added`` is not scaled: on silenced columns an addition still reads
    its input. ``added`` is None where rows and columns are scaled, and nothing is added.
    """

    op: ClassVar[str] = "scale_add"
    tensor: str
    scales: tuple[Scale, ...]
    added: LowRank | Bias | None

    def scaled(self, factor: float) -> ScaleAdd:
        added = None if self.added is None else self.added.scaled(factor)
        return replace(self, scales=tuple(one.scaled(factor) for one in self.scales), added=added)

    @property
    def norm(self) -> None:
        """Not known from the plan alone."""

    def parts(self) -> dict[str, torch.Tensor]:
        return {name: value for one in _steps(self) for name, value in one.parts().items()}

    def fits(self, shape: tuple[int, ...]) -> bool:
        return all(one.fits(shape) for one in _steps(self))

    def apply(self, block: torch.Tensor, first: int, out_in: bool) -> None:
        for one in _steps(self):
            one.apply(block, first, out_in)

    @classmethod
    def read(cls, entry: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> ScaleAdd:
        scales = _read_scales(entry, parts)
        added = LowRank.read(entry, parts) if "B" in parts else Bias.read(entry, parts) if "bias" in parts else None
        if len(scales) + (added is not None) < 2:
            raise ValueError("it has fewer than two of: factors of rows, of columns, of the whole, an addition")
        return cls(entry["tensor"], scales, added)


def _steps(edit: ScaleAdd) -> tuple[Scale | LowRank | Bias, ...]:
    return edit.scales if edit.added is None else (*edit.scales, edit.added)


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


Edit = LowRank | Bias | NewBias | Scale | ScaleAdd | Assign
OPS: Mapping[str, type[LowRank] | type[Bias] | type[Scale] | type[ScaleAdd] | type[Assign]] = {
    kind.op: kind for kind in (LowRank, Bias, NewBias, Scale, ScaleAdd, Assign)
}
_PARTS = ("B", "A", "push", "bias", *_SCALE_PARTS.values(), "rows", "values")
_DTYPES = {"rows": torch.int64, **dict.fromkeys(_SCALE_PARTS.values(), torch.float64)}


def scales_of(edit: Edit) -> tuple[Scale, ...]:
    """The scales within an edit, at most one for each axis."""
    return (edit,) if isinstance(edit, Scale) else edit.scales if isinstance(edit, ScaleAdd) else ()


def addition_of(edit: Edit) -> LowRank | Bias | None:
    """What an edit adds, if it adds something."""
    return edit.added if isinstance(edit, ScaleAdd) else edit if isinstance(edit, (LowRank, Bias)) else None


def edit_tensors(edit: Edit) -> dict[str, torch.Tensor]:
    """What a plan's file holds of an edit: tensors called ``<tensor>.<part>``."""
    return {f"{edit.tensor}.{part}": value for part, value in edit.parts().items()}


def read_edit(entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Edit:
    """The edit that ``{"tensor", "op"}`` and a plan's tensors describe. Raises PlanError where they are not sound."""
    name = entry["tensor"]
    kind = OPS.get(entry["op"])
    if kind is None:
        raise PlanError(f"the plan holds the unknown operation {entry['op']!r} on {name}")
    parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
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
