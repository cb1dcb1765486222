"""Matrices in the formats of compressed-tensors (llm-compressor, vLLM), read as numbers.

``X.weight_packed`` [out, in · bits / 32] holds whole numbers of a few bits, each plus ``2^(bits - 1)``, row by row; ``X.weight``
int8 or fp8 values themselves. ``X.weight_scale`` is one step, one for each row, or [out, groups]; ``X.weight_zero_point`` what is
taken off before, packed along the outputs beside a packed matrix. ``X.weight_g_idx`` names each input's group where inputs were
sorted.
In nvfp4 and mxfp4 each byte holds two fp4 values (e2m1), the first in the low bits: nvfp4's scales are divided by
``X.weight_global_scale``, mxfp4's are exponents of two, plus 127.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.checkpoint.bits import unpacked
from steer2edit.checkpoint.gptq import part_of_matrix
from steer2edit.checkpoint.header import Read, TensorInfo, dequantised
from steer2edit.errors import CheckpointError, shown

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The sixteen numbers of four bits: a sign, two bits of exponent and one more."""
_VALUES = {"I8", "F8_E4M3"}
_FORMATS = {
    "pack-quantized": "whole numbers, packed",
    "int-quantized": "whole numbers",
    "float-quantized": "fp8",
    "naive-quantized": "8 bits",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}


@dataclass(frozen=True)
class Scaled:
    """A matrix [out, in] of scaled values. ``bits`` are those of packed whole numbers; ``fp4`` is whether values are of e2m1."""

    values: TensorInfo
    scales: TensorInfo
    shape: tuple[int, int]
    bits: int | None = None
    fp4: bool = False
    zeros: TensorInfo | None = None
    order: TensorInfo | None = None
    divisor: TensorInfo | None = None
    others: tuple[TensorInfo, ...] = ()

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        optional = (self.zeros, self.order, self.divisor)
        return (self.values, self.scales, *(one for one in optional if one is not None), *self.others)

    def decoder(self, read: Read) -> Callable[[int, int], torch.Tensor]:
        """Rows in float32."""
        outputs, columns = self.shape
        scales = _steps(read(self.scales), self.scales, outputs)
        if self.divisor is not None:
            scales = scales / read(self.divisor).float()
        groups = scales.shape[1]
        group = torch.arange(columns) * groups // columns if self.order is None else read(self.order).long()
        zeros = None if self.zeros is None else self._zero_points(read(self.zeros), groups)

        def rows(first: int, count: int) -> torch.Tensor:
            raw = read(self.values.rows(first, count))
            if self.fp4:
                numbers = E2M1[torch.stack((raw & 15, raw >> 4), dim=2).flatten(1).long()]
            elif self.bits is not None:
                numbers = (unpacked(raw, self.bits, 1)[:, :columns] - (1 << (self.bits - 1))).float()
            else:
                numbers = raw.float()
            if zeros is not None:
                numbers = numbers - zeros[first : first + count][:, group]
            return numbers * scales[first : first + count][:, group]

        return rows

    def _zero_points(self, raw: torch.Tensor, groups: int) -> torch.Tensor:
        """Zero points [out, groups] in float32."""
        if self.bits is not None and raw.dtype == torch.int32:
            return (unpacked(raw, self.bits, 0)[: self.shape[0]] - (1 << (self.bits - 1))).float()
        return raw.float().reshape(-1, groups).expand(self.shape[0], groups)


def _steps(raw: torch.Tensor, info: TensorInfo, outputs: int) -> torch.Tensor:
    """Scales [out, groups] in float32: one for all, one for each row, or one for each group."""
    wide = torch.exp2(raw.float() - 127) if raw.dtype == torch.uint8 else raw.float()
    return wide.reshape(-1, 1).expand(outputs, 1) if wide.numel() in (1, outputs) else wide


def packed_matrices(
    settings: Mapping[str, Any], stored: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], str]:
    """Each quantised matrix by its name, and the format in words. Raises CheckpointError for layouts that are not known."""
    groups = settings.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    if not groups and "format" not in settings:
        return {}, ""
    schemes = [one for one in groups.values() if isinstance(one, dict)]
    formats = {str(one.get("format") or settings.get("format")) for one in schemes} or {str(settings.get("format"))}
    if strange := sorted(formats - _FORMATS.keys()):
        raise CheckpointError(
            f"its matrices are in the format {shown(strange[0])} of compressed-tensors; read are {', '.join(_FORMATS)}"
        )
    if turned := [key for key in ("transform_config", "sparsity_config") if _says(settings.get(key))]:
        raise CheckpointError(
            f"its {turned[0]} changes matrices or inputs beside the quantisation, which is not described"
        )
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if name.endswith(".weight_packed"):
            base = name.removesuffix("weight_packed")
            packed = _packed(stored, base, info, read, schemes)
        elif name.endswith(".weight") and info.dtype in _VALUES and f"{name}_scale" in stored:
            base = name.removesuffix("weight")
            packed = _plain(stored, base, info)
        else:
            continue
        matrix = f"{base}weight"
        found[matrix] = dequantised(matrix, packed.shape, info.shard, packed)
    told = [_FORMATS[one] for one in sorted(formats)]
    bits = sorted({str(one["weights"]["num_bits"]) for one in schemes if _says(one.get("weights"), "num_bits")})
    return found, f"compressed-tensors, {' and '.join(told)}{f', {bits[0]} bits' if len(bits) == 1 else ''}"


def _packed(
    stored: Mapping[str, TensorInfo], base: str, values: TensorInfo, read: Read, schemes: list[dict[str, Any]]
) -> Scaled:
    scales = part_of_matrix(stored, f"{base}weight_scale")
    outputs = values.shape[0] if len(values.shape) == 2 else 0
    if values.dtype == "U8" and outputs:
        divisor = stored.get(f"{base}weight_global_scale")
        _check_scales(scales, (outputs, 2 * values.shape[1]), values)
        return Scaled(values, scales, (outputs, 2 * values.shape[1]), fp4=True, divisor=divisor)
    size = part_of_matrix(stored, f"{base}weight_shape")
    shape = tuple(read(size).flatten().tolist())
    if values.dtype != "I32" or len(shape) != 2 or shape[0] != outputs or shape[1] < 1:
        raise CheckpointError(f"{values.name} is {values.dtype} {list(values.shape)}; {size.name} says {list(shape)}")
    possible = {one["weights"]["num_bits"] for one in schemes if _says(one.get("weights"), "num_bits")} or set(
        range(1, 9)
    )
    fitting = [bits for bits in sorted(possible) if type(bits) is int and -(-shape[1] * bits // 32) == values.shape[1]]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{values.name} {list(values.shape)} for a matrix of {list(shape)} does not tell how many bits a number has; "
            "expected num_bits in quantization_config.config_groups"
        )
    _check_scales(scales, shape, values)
    optional = [stored.get(f"{base}{leaf}") for leaf in ("weight_zero_point", "weight_g_idx")]
    return Scaled(
        values, scales, shape, fitting[0], zeros=optional[0], order=_order(optional[1], shape), others=(size,)
    )


def _plain(stored: Mapping[str, TensorInfo], base: str, values: TensorInfo) -> Scaled:
    scales = part_of_matrix(stored, f"{base}weight_scale")
    if len(values.shape) != 2:
        raise CheckpointError(f"{values.name} has the shape {list(values.shape)}; expected a matrix")
    shape = (values.shape[0], values.shape[1])
    _check_scales(scales, shape, values)
    optional = [stored.get(f"{base}{leaf}") for leaf in ("weight_zero_point", "weight_g_idx")]
    return Scaled(values, scales, shape, zeros=optional[0], order=_order(optional[1], shape))


def _check_scales(scales: TensorInfo, shape: tuple[int, int], values: TensorInfo) -> None:
    """Raise CheckpointError unless scales are one, one for each row, or one for each equal group."""
    count = math.prod(scales.shape)
    grouped = len(scales.shape) == 2 and scales.shape[0] == shape[0] and shape[1] % max(scales.shape[1], 1) == 0
    if count not in (1, shape[0]) and not grouped:
        raise CheckpointError(
            f"{scales.name} has the shape {list(scales.shape)}; {values.name} of {list(shape)} takes one scale, one for each "
            "row, or one for each of equal groups of a row"
        )


def _order(info: TensorInfo | None, shape: tuple[int, int]) -> TensorInfo | None:
    if info is not None and info.shape != (shape[1],):
        raise CheckpointError(
            f"{info.name} has the shape {list(info.shape)}; expected a group for each of {shape[1]} inputs"
        )
    return info


def _says(value: object, key: str | None = None) -> bool:
    """Whether a part of a config is there and says something, under ``key`` where one is asked for."""
    return isinstance(value, dict) and bool(value if key is None else value.get(key))
