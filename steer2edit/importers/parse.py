"""Parsing foreign files of tensors, in a child process that can be killed (:class:`steer2edit.files.sandbox.Apart`).

The functions here run in the child. They give plain values and dense tensors of real numbers, whose size was checked before
memory was asked for them.
"""

from __future__ import annotations

import atexit
import functools
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steer2edit.errors import DataError, first_line
from steer2edit.files.sandbox import Apart, ApartError, Limits, TooMuchError

# vectors of 500 layers of 65,536 numbers in float32 take 131 MB, the typical inputs of their writers a few times as much
MOST_BYTES = 1 << 30
_LIMITS = Limits(seconds=120, memory=4 << 30, output=MOST_BYTES + (64 << 20))
_NOT_NUMBERS = "not a dense tensor of real numbers"


def parsed(function: Callable[[str], Any], path: Path) -> Any:
    """What ``function``, one of this module, makes of a file. Raises DataError with the reason why it cannot be read."""
    try:
        return _apart().call(function, str(path))
    except (TooMuchError, ApartError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


@functools.cache
def _apart() -> Apart:
    apart = Apart(_LIMITS, idle=20)
    atexit.register(apart.close)
    return apart


@dataclass
class _SteeringVector:
    """What stands in for the steering-vectors library's class while its pickle is read: the same two fields, no code."""

    layer_activations: dict[int, torch.Tensor] = field(default_factory=dict)
    layer_type: str = "decoder_block"


# the weights-only reader admits a class by its full name
_SteeringVector.__module__, _SteeringVector.__qualname__ = "steering_vectors.steering_vector", "SteeringVector"


def torch_file(path: str) -> Any:
    """The content of a ``torch.save`` file; a SteeringVector becomes ``("SteeringVector", layer type, vectors)``."""
    try:
        with torch.serialization.safe_globals([_SteeringVector]), warnings.catch_warnings():
            # of kinds of tensors that are refused below, and of a pickle protocol that it may not read
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors and plain values, and is not read: {first_line(error)}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch's reader raises whatever a damaged file leads it to
        raise DataError(f"{path} is not a readable torch file: {first_line(error)}") from None
    if isinstance(content, _SteeringVector):
        content = ("SteeringVector", content.layer_type, content.layer_activations)
    return _Dense(path).checked(content, "")


def numpy_file(path: str) -> Any:
    """The arrays of an ``.npz`` archive by name, or the array of an ``.npy`` file. Pickles are refused."""
    import zipfile

    import numpy

    dense = _Dense(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                dense.add(sum(entry.file_size for entry in archive.infolist()), "its content")
        with open(path, "rb") as file:
            loaded = numpy.load(file, allow_pickle=False)
            content: Any
            if isinstance(loaded, numpy.ndarray):
                content = torch.from_numpy(loaded)
            else:
                content = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except (DataError, MemoryError):
        raise
    except Exception as error:  # NumPy's, zipfile's and zlib's own, and what torch says of odd dtypes
        raise DataError(f"{path} is not a NumPy file of numbers: {first_line(error)}") from None
    return _Dense(path).checked(content, "")


def safetensors_file(path: str) -> Any:
    """Metadata and tensors of a safetensors file."""
    from steer2edit.errors import PlanError
    from steer2edit.files.atomic import load_tensors

    dense = _Dense(path)
    try:
        dense.add(Path(path).stat().st_size, "its content")
        tensors, metadata = load_tensors(Path(path))
    except (OSError, PlanError) as error:
        raise DataError(str(error)) from None
    return [metadata, _Dense(path).checked(tensors, "")]


def gguf_file(path: str) -> Any:
    """Fields of a GGUF file and, of a control vector, the model it names and its directions."""
    from steer2edit.checkpoint.gguf import CONTROL_VECTOR, read_control_vector, read_gguf
    from steer2edit.errors import PlanError

    try:
        fields, _ = read_gguf(Path(path), tensors=False)
        names = ("general.architecture", "general.type", "adapter.type")
        known = {name: fields[name] for name in names if isinstance(fields.get(name), str)}
        if known.get("general.architecture") != CONTROL_VECTOR:
            return [known, None, {}]
        _Dense(path).add(Path(path).stat().st_size, "its content")
        hint, directions = read_control_vector(Path(path))
    except PlanError as error:
        raise DataError(str(error)) from None
    return [known, hint, directions]


class _Dense:
    """Checks what a file holds: only kinds of tensors that are plain arrays of numbers, and no more than fits."""

    def __init__(self, path: str) -> None:
        self._path, self._bytes = path, 0

    def add(self, size: int, what: str) -> None:
        """Count bytes. Raises DataError past the limit."""
        self._bytes += size
        if self._bytes > MOST_BYTES:
            raise DataError(
                f"{self._path} holds more than {MOST_BYTES / 1e9:.1f} GB of tensors ({what}); vectors take far less"
            )

    def checked(self, value: Any, where: str, depth: int = 0) -> Any:
        """The value, with tensors as contiguous arrays. Raises DataError for other kinds of tensors."""
        if depth > 50:
            raise DataError(f"{self._path} nests too deeply")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where or "the file's tensor")
        if isinstance(value, Mapping):
            return {key: self.checked(one, str(key), depth + 1) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.checked(one, f"{where}[{i}]", depth + 1) for i, one in enumerate(value)])
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        # dtypes, sizes and the like stand beside vectors in some files
        return f"{type(value).__name__}"

    def _tensor(self, tensor: torch.Tensor, where: str) -> torch.Tensor:
        kind = ""
        if tensor.is_nested:
            kind = "a nested tensor"
        elif tensor.layout != torch.strided:
            kind = "a sparse tensor"
        elif tensor.is_quantized:
            kind = "a quantised tensor"
        elif tensor.is_meta:
            kind = "a tensor without data"
        elif tensor.is_complex():
            kind = "a tensor of complex numbers"
        elif tensor.dtype == torch.bool:
            kind = "a tensor of truth values"
        if kind:
            raise DataError(f"{self._path}: {where} is {kind}, {_NOT_NUMBERS}; save it with .to_dense().float()")
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes():
            raise DataError(
                f"{self._path}: {where} is an expanded tensor, which stands for {size} bytes and stores "
                f"{tensor.untyped_storage().nbytes()}; save its .clone()"
            )
        self.add(size, where)
        return tensor.detach().contiguous()
