"""Files of one vector for each layer: safetensors, NumPy archives, and pickles of tensors.

A name's single number is its layer; what else the name says decides the place (``attn``, ``mlp``, or the stream). An array
[layers, hidden] has one row for each layer.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steer2edit.capture.vectors import Vectors
from steer2edit.errors import DataError, PlanError, first_line, listing
from steer2edit.files.atomic import load_tensors
from steer2edit.importers.source import Reading, described

# under one of these keys files keep the vectors beside other things
_NESTED = ("layer_activations", "steering_vectors", "directions", "vectors")
_ATTENTION = re.compile(r"attn_out|self_attn|attention|o_proj|out_proj")
_MLP = re.compile(r"mlp|down_proj|feed_forward|ffn")
# places that are neither the stream after a block nor a writer's output
_ELSEWHERE = re.compile(r"layernorm|ln_?\d|norm|resid_mid|q_proj|k_proj|v_proj|gate|up_proj|hook_z|lora_")
_LAYER_TYPES = {"decoder_block": "residual", "self_attn": "attn_out", "mlp": "mlp_out"}
# what torch's reader meets in a damaged file
_BROKEN = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, MemoryError),
    *(ArithmeticError, struct.error),
)


@dataclass
class _SteeringVector:
    """What stands in for the steering-vectors library's class while its pickle is read: the same two fields, no code."""

    layer_activations: dict[int, torch.Tensor] = field(default_factory=dict)
    layer_type: str = "decoder_block"


# the weights-only reader admits a class by its full name
_SteeringVector.__module__, _SteeringVector.__qualname__ = "steering_vectors.steering_vector", "SteeringVector"


def load_pickle(path: Path) -> Any:
    """The content of a ``torch.save`` file, tensors and plain values only. Raises DataError for anything else in it."""
    try:
        with torch.serialization.safe_globals([_SteeringVector]), warnings.catch_warnings():
            # of a pickle protocol that it may not read: then it says so itself
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors and plain values, and is not read: {first_line(error)}"
        ) from None
    except _BROKEN as error:
        raise DataError(f"{path} is not a readable torch file: {first_line(error)}") from None


def read_held(held: Any, path: Path, reading: Reading) -> Vectors:
    """Vectors from what a pickle held."""
    if isinstance(held, _SteeringVector):
        place = _LAYER_TYPES.get(held.layer_type)
        if place is None:
            raise DataError(
                f"{path} steers {held.layer_type!r}; only {', '.join(_LAYER_TYPES)} are outputs that weights can add to"
            )
        named = {f"{place}.{layer}": vector for layer, vector in held.layer_activations.items()}
        return at_layers(named, described(path, "steering-vectors"), reading)
    if isinstance(held, Mapping):
        nested = [key for key in _NESTED if isinstance(held.get(key), (Mapping, list, torch.Tensor))]
        if len(nested) == 1:
            held = held[nested[0]]
    return at_layers(held, described(path, "per-layer torch file"), reading)


def read_safetensors(path: Path, reading: Reading) -> Vectors:
    """Vectors from a safetensors file, this project's own or anyone's."""
    try:
        tensors, metadata = load_tensors(path)
    except PlanError as error:
        raise DataError(str(error)) from None
    if "vectors" in metadata:
        return Vectors.load(path)
    if "plan" in metadata:
        raise DataError(f"{path} is a plan already: use it with --plan, show, scale or emit")
    if any(".lora_A." in name for name in tensors):
        raise DataError(f"{path} is an adapter's weights; give its folder, which has adapter_config.json too")
    return at_layers(tensors, described(path, "per-layer safetensors"), reading)


def read_numpy(path: Path, reading: Reading) -> Vectors:
    """Vectors from an ``.npz`` archive or an ``.npy`` array; object arrays, which are pickles, are refused."""
    import tokenize
    import zipfile
    import zlib

    import numpy

    faults = (OSError, ValueError, TypeError, EOFError, SyntaxError, NotImplementedError, MemoryError)
    try:
        with open(path, "rb") as file:
            loaded = numpy.load(file, allow_pickle=False)
            held: Any
            if isinstance(loaded, numpy.ndarray):
                held = torch.from_numpy(loaded)
            else:
                held = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except (*faults, tokenize.TokenError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a NumPy file of numbers: {error}") from None
    return at_layers(held, described(path, f"per-layer {path.suffix[1:]}"), reading)


def at_layers(held: Any, source: Mapping[str, Any], reading: Reading) -> Vectors:
    """Vectors by place from a mapping, a list or an array of them. Raises DataError listing what cannot be placed."""
    file = source["file"]
    if isinstance(held, torch.Tensor):
        held = _rows(held, file, reading)
    elif isinstance(held, list):
        held = dict(enumerate(held))
    if not isinstance(held, Mapping) or not held:
        raise DataError(f"{file} holds {type(held).__name__}; expected vectors by layer, a list of them, or an array")
    if len(held) == 1 and reading.layers is not None:
        vector = next(iter(held.values()))
        held = {layer - reading.offset: vector for layer in range(reading.layers[0], reading.layers[1] + 1)}
    elif reading.layers is not None:
        raise DataError(
            f"{file} holds {len(held)} vectors with layers of their own; --layers is for a file with a single one"
        )
    directions: dict[str, torch.Tensor] = {}
    problems, left_out = [], []
    for name, value in held.items():
        place, problem = _place(name, reading.offset)
        vector = value.detach().float().squeeze() if isinstance(value, torch.Tensor) else value
        if not isinstance(vector, torch.Tensor) or vector.ndim != 1 or value.is_complex():
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            problem = problem or f"{name} is {shape}, expected one vector"
        elif not bool(vector.isfinite().all()):
            problem = problem or f"{name} holds NaN or infinity"
        if problem:
            problems.append(problem)
        elif place.endswith(".-1"):
            # entry 0 of hidden_states is the embedding, which no block writes
            left_out.append(str(name))
        elif place in directions:
            problems.append(f"{name} is a second vector for {place}")
        else:
            directions[place] = vector.contiguous()
    if problems or not directions:
        raise DataError(f"{file} cannot be read as vectors by layer:\n{listing(problems or ['it holds none'])}")
    more = {"left_out": left_out} if left_out else {}
    return Vectors(directions, source={**source, **more})


def _rows(array: torch.Tensor, file: str, reading: Reading) -> dict[int, torch.Tensor]:
    if array.ndim == 1 or (array.ndim == 2 and array.shape[0] == 1):
        if reading.layers is None:
            raise DataError(
                f"{file} holds a single vector of {array.shape[-1]} numbers; say with --layers where it goes"
            )
        return {0: array}
    if array.ndim != 2:
        raise DataError(
            f"{file} holds an array of the shape {list(array.shape)}; expected [layers, hidden] or [hidden]"
        )
    return dict(enumerate(array))


def _place(name: Any, offset: int) -> tuple[str, str]:
    """The place that an entry's name stands for, and what is wrong with it."""
    text = str(name)
    numbers = re.findall(r"\d+", text)
    if len(numbers) != 1:
        return "", f"{text} names no single layer"
    layer = int(numbers[0]) + offset
    if _ELSEWHERE.search(text):
        return "", f"{text} is neither the stream after a block nor a writer's output"
    if "resid_pre" in text:
        layer -= 1
    if layer < -1:
        return "", f"{text} would lie before the first block"
    role = "attn_out" if _ATTENTION.search(text) else "mlp_out" if _MLP.search(text) else "residual"
    return f"{role}.{layer}", ""
