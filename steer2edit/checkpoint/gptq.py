"""Matrices in GPTQ's layout, read as numbers.

``X.qweight`` [in · bits / 32, out] holds q of each input and output, packed along the inputs; ``X.qzeros`` [groups,
out · bits / 32] the zero points z, packed along the outputs; ``X.scales`` [groups, out] the steps s; ``X.g_idx`` [in] each
input's group. ``W[o, i] = s[g, o] (q[i, o] - z[g, o])``. Where inputs were sorted by their size (desc_act), the groups in
``g_idx`` are not in order. In the first version of the format z is stored less one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.checkpoint.bits import unpacked
from steer2edit.checkpoint.header import Read, TensorInfo, dequantised
from steer2edit.errors import CheckpointError, shown

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point."""


@dataclass(frozen=True)
class Gptq:
    """A matrix in GPTQ's layout. ``add`` is what a stored zero point lacks; without ``groups`` inputs are in their order."""

    weights: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    groups: TensorInfo | None
    bits: int
    group: int
    add: int

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return (self.weights, self.zeros, self.scales, *(() if self.groups is None else (self.groups,)))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the matrix."""
        return self.weights.shape[1], self.weights.shape[0] * 32 // self.bits

    def decoder(self, read: Read) -> Callable[[int, int], torch.Tensor]:
        """Rows in float32. The packed matrix is read whole, since a row's numbers are everywhere in it."""
        words, scales = read(self.weights), read(self.scales).float()
        zeros = unpacked(read(self.zeros), self.bits, 1)[:, : self.shape[0]]
        if self.add and bool((zeros == (1 << self.bits) - 1).any()):
            raise CheckpointError(
                f"{self.zeros.name} holds zero points that the first version of the format cannot (it stores them less one); "
                "engines differ in how they read it: save the model again as gptq_v2"
            )
        columns = self.shape[1]
        group = torch.arange(columns) // self.group if self.groups is None else read(self.groups).long()
        if bool(((group < 0) | (group >= len(scales))).any()):
            raise CheckpointError(f"{self.weights.name} has inputs in groups that {self.scales.name} has no scales of")

        def rows(first: int, count: int) -> torch.Tensor:
            chosen = slice(first, first + count)
            q = unpacked(words[:, chosen], self.bits, 0)
            return (scales[group, chosen] * (q - (zeros[group, chosen] + self.add))).T.contiguous()

        return rows


def packed_matrices(
    settings: Mapping[str, Any], stored: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], str]:
    """Each quantised matrix by its name, and the format in words. Raises CheckpointError for layouts that are not known."""
    # the name of the key has changed; AutoGPTQ wrote none, and meant the first version
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if version not in _FORMATS:
        raise CheckpointError(
            f"its matrices are in GPTQ's layout {shown(version)}, which is an engine's own order; read are "
            f"{' and '.join(_FORMATS)}"
        )
    found: dict[str, TensorInfo] = {}
    bits = set()
    for name, info in stored.items():
        if name.endswith(".qweight"):
            packed = _matrix(stored, name.removesuffix("qweight"), info, settings, _FORMATS[version])
            bits.add(packed.bits)
            shape = packed.shape
            matrix = name.removesuffix("qweight") + "weight"
            found[matrix] = dequantised(matrix, shape, info.shard, packed)
    size = settings.get("group_size")
    groups = f", groups of {size}" if isinstance(size, int) and size > 0 else ""
    order = ", inputs in the order of their size" if settings.get("desc_act") else ""
    return found, f"{version}, {' and '.join(map(str, sorted(bits)))} bits{groups}{order}"


def _matrix(
    stored: Mapping[str, TensorInfo], base: str, weights: TensorInfo, settings: Mapping[str, Any], add: int
) -> Gptq:
    zeros, scales = part_of_matrix(stored, f"{base}qzeros"), part_of_matrix(stored, f"{base}scales")
    groups = stored.get(f"{base}g_idx")
    if any(len(one.shape) != 2 for one in (weights, zeros, scales)) or 0 in (*weights.shape, *zeros.shape):
        raise CheckpointError(f"{weights.name} and its zero points and scales have not two axes each")
    # a model may have matrices of several widths, and only the shapes tell which has which
    bits, rest = divmod(zeros.shape[1] * 32, weights.shape[1])
    if rest or bits not in (2, 3, 4, 8) or weights.shape[0] * 32 % bits:
        told = settings.get("bits")  # outputs that do not fill the last word
        bits = told if isinstance(told, int) else 0
        if bits not in (2, 3, 4, 8) or zeros.shape[1] != -(-weights.shape[1] * bits // 32):
            raise CheckpointError(
                f"{weights.name} {list(weights.shape)} beside {zeros.name} {list(zeros.shape)} is not of 2, 3, 4 or 8 bits"
            )
    columns = weights.shape[0] * 32 // bits
    expected = (len_of(zeros), weights.shape[1])
    wrong = [one for one in (weights, zeros) if one.dtype != "I32"]
    if wrong or scales.shape != expected or (groups is not None and groups.shape != (columns,)):
        raise CheckpointError(
            f"{weights.name} {weights.dtype} {list(weights.shape)} has scales {list(scales.shape)}, zero points {zeros.dtype} "
            f"{list(zeros.shape)} and groups {None if groups is None else list(groups.shape)}, which do not fit together"
        )
    return Gptq(weights, zeros, scales, groups, bits, -(-columns // len_of(scales)), add)


def part_of_matrix(stored: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """A tensor that belongs to a quantised matrix. Raises CheckpointError where it is missing."""
    if name not in stored:
        raise CheckpointError(f"{name} is missing, a part of a quantised matrix")
    return stored[name]


def len_of(info: TensorInfo) -> int:
    """How many rows a tensor has."""
    return info.shape[0]
