"""Matrices in AWQ's layout (gemm), read as numbers.

``X.qweight`` [in, out / 8] holds 4-bit q of each input and output, packed along the outputs; ``X.qzeros`` [groups, out / 8] the
zero points z in the same way; ``X.scales`` [groups, out] the steps s. ``W[o, i] = s[g, o] (q[i, o] - z[g, o])`` with g the group
of input i. A word's eight numbers are those of the outputs 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.checkpoint.bits import unpacked
from steer2edit.checkpoint.gptq import part_of_matrix
from steer2edit.checkpoint.header import Read, TensorInfo, dequantised
from steer2edit.errors import CheckpointError, shown

_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in its word the number of each of eight outputs lies."""


@dataclass(frozen=True)
class Awq:
    """A matrix in AWQ's layout, with as many inputs in a group as ``group`` says."""

    weights: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    group: int

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return (self.weights, self.zeros, self.scales)

    def decoder(self, read: Read) -> Callable[[int, int], torch.Tensor]:
        """Rows in float32. The packed matrix is read whole, since a row's numbers are everywhere in it."""
        words, zeros, scales = read(self.weights), read(self.zeros), read(self.scales).float()

        def rows(first: int, count: int) -> torch.Tensor:
            low, high = first // 8, -(-(first + count) // 8)
            inside = slice(first - 8 * low, first - 8 * low + count)
            q, z = _ordered(words[:, low:high])[:, inside], _ordered(zeros[:, low:high])[:, inside]
            z, s = (one.repeat_interleave(self.group, dim=0) for one in (z, scales[:, first : first + count]))
            return (s * (q - z)).T.contiguous()

        return rows


def packed_matrices(
    settings: Mapping[str, Any], stored: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], str]:
    """Each quantised matrix by its name, and the format in words. Raises CheckpointError for layouts that are not known."""
    version, bits = settings.get("format") or settings.get("version") or "gemm", settings.get("bits", 4)
    if str(version).lower() != "gemm" or bits != 4:
        raise CheckpointError(
            f"its matrices are in AWQ's layout {shown(version)} with {shown(bits)} bits; read is gemm with 4 bits"
        )
    found: dict[str, TensorInfo] = {}
    for name, weights in stored.items():
        if name.endswith(".qweight"):
            base = name.removesuffix("qweight")
            zeros, scales = part_of_matrix(stored, f"{base}qzeros"), part_of_matrix(stored, f"{base}scales")
            columns, outputs = weights.shape[0], 8 * weights.shape[-1]
            groups = scales.shape[0] if len(scales.shape) == 2 else 0
            fits = groups and columns % groups == 0 and (weights.dtype, zeros.dtype) == ("I32", "I32")
            if not fits or scales.shape != (groups, outputs) or zeros.shape != (groups, weights.shape[-1]):
                raise CheckpointError(
                    f"{name} {weights.dtype} {list(weights.shape)} has zero points {zeros.dtype} {list(zeros.shape)} and scales "
                    f"{list(scales.shape)}, which do not fit together"
                )
            packed, matrix = Awq(weights, zeros, scales, columns // groups), f"{base}weight"
            found[matrix] = dequantised(matrix, (outputs, columns), weights.shard, packed)
    size = settings.get("group_size", settings.get("q_group_size"))
    groups_of = f", groups of {size}" if isinstance(size, int) and size > 0 else ""
    return found, f"AWQ (gemm), 4 bits{groups_of}"


def _ordered(words: torch.Tensor) -> torch.Tensor:
    """The numbers in ``words`` [rows, n] in the order of the outputs, [rows, 8 n]."""
    return unpacked(words, 4, 1).view(len(words), -1, 8)[:, :, _PLACES].reshape(len(words), -1)
