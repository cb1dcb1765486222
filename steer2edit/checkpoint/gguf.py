"""Reading and writing GGUF, llama.cpp's file format, through its own gguf library (an extra: ``steer2edit[gguf]``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steer2edit.errors import PlanError, TargetError, listing

Fields = Mapping[str, str | float | int]
CONTROL_VECTOR = "controlvector"


def write_gguf(path: Path, architecture: str, tensors: Mapping[str, torch.Tensor], fields: Fields) -> None:
    """One GGUF file of float32 tensors; whole numbers are stored as uint32."""
    gguf = library()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields and, with ``tensors``, float tensors of a GGUF file. Raises PlanError for damaged files and quantised tensors."""
    gguf = library()
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise PlanError(f"{path} is not a readable GGUF file: {error}") from None
    if not tensors:
        return fields, {}
    floats = {"F32", "F16", "F64"}
    strange = [
        f"{tensor.name} is {tensor.tensor_type.name}"
        for tensor in reader.tensors
        if tensor.tensor_type.name not in floats
    ]
    if strange:
        raise PlanError(f"{path} holds tensors that are not float32, float16 or float64:\n{listing(strange)}")
    # copies: the reader's arrays lie in the mapped file
    return fields, {tensor.name: torch.tensor(tensor.data).float() for tensor in reader.tensors}


def read_control_vector(path: Path) -> tuple[str | None, dict[int, torch.Tensor]]:
    """The model type that a control vector's file names, and its directions, float32 ``[hidden]`` by block.

    ``direction.N`` is added to the output of block N. Raises PlanError for other files.
    """
    fields, tensors = read_gguf(path)
    architecture = fields.get("general.architecture")
    if architecture != CONTROL_VECTOR:
        raise PlanError(
            f"{path} has the architecture {architecture!r}, expected {CONTROL_VECTOR!r}: it is not a control vector"
        )
    directions = {}
    for name, tensor in tensors.items():
        head, _, layer = name.partition(".")
        if (
            head != "direction"
            or not (layer.isdecimal() and len(layer) <= 6)
            or tensor.ndim != 1
            or not bool(tensor.isfinite().all())
        ):
            raise PlanError(f"{path}: {name} {list(tensor.shape)} is not a finite vector called direction.N")
        directions[int(layer)] = tensor
    hint = fields.get(f"{CONTROL_VECTOR}.model_hint")
    return (hint if isinstance(hint, str) else None), directions


def library() -> Any:
    """The gguf library. Raises TargetError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise TargetError("GGUF files need the gguf library: pip install 'steer2edit[gguf]'") from None
    return gguf
