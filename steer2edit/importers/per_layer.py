"""Files of one vector for each layer: safetensors, NumPy archives, and pickles of tensors.

A name's single number is its layer; what else the name says decides the place (``attn``, ``mlp``, or the stream). An array
[layers, hidden] has one row for each layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from steer2edit.capture.vectors import Vectors
from steer2edit.errors import DataError, brief, listing, shown
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.importers.source import Importer, Reading, Source

# under one of these keys files keep the vectors beside other things
_NESTED = ("layer_activations", "steering_vectors", "directions", "vectors")
_ATTENTION = re.compile(r"attn_out|self_attn|attention|o_proj|out_proj")
_MLP = re.compile(r"mlp|down_proj|feed_forward|ffn")
# places that are neither the stream after a block nor a writer's output
_ELSEWHERE = re.compile(r"layernorm|ln_?\d|norm|resid_mid|q_proj|k_proj|v_proj|gate|up_proj|hook_z|lora_")
_MOST_DIGITS = 6
_MOST_LAYERS = 10_000
_LAYER_TYPES = {"decoder_block": "residual", "self_attn": "attn_out", "mlp": "mlp_out"}


def _read_torch(source: Source, reading: Reading) -> Vectors:
    content = source.content
    if isinstance(content, tuple) and len(content) == 3 and content[0] == "SteeringVector":
        _, layer_type, vectors = content
        place = _LAYER_TYPES.get(layer_type) if isinstance(layer_type, str) else None
        if place is None or not isinstance(vectors, Mapping):
            raise DataError(
                f"{source.path} steers {shown(layer_type)}; only {', '.join(_LAYER_TYPES)} are outputs that weights can add to"
            )
        named = {f"{place}.{layer}": vector for layer, vector in vectors.items()}
        return at_layers(named, source.described("steering-vectors"), reading)
    if isinstance(content, Mapping):
        nested = [key for key in _NESTED if isinstance(content.get(key), (Mapping, list, torch.Tensor))]
        if len(nested) == 1:
            content = content[nested[0]]
    return at_layers(content, source.described("per-layer torch file"), reading)


def _read_safetensors(source: Source, reading: Reading) -> Vectors:
    """Vectors from a safetensors file, this project's own or anyone's."""
    metadata, tensors = source.content
    if "vectors" in metadata:
        return Vectors.load(source.path)
    if "plan" in metadata:
        raise DataError(f"{source.path} is a plan already: use it with --plan, show, scale or emit")
    if any(".lora_A." in name for name in tensors):
        raise DataError(f"{source.path} is an adapter's weights; give its folder, which has {ADAPTER_CONFIG} too")
    return at_layers(tensors, source.described("per-layer safetensors"), reading)


def _read_numpy(source: Source, reading: Reading) -> Vectors:
    """Vectors from an ``.npz`` archive or an ``.npy`` array."""
    return at_layers(source.content, source.described(f"per-layer {source.path.suffix[1:]}"), reading)


def at_layers(held: Any, source: Mapping[str, Any], reading: Reading) -> Vectors:
    """Vectors by place from a mapping, a list or an array of them. Raises DataError listing what cannot be placed."""
    file = source["file"]
    if isinstance(held, torch.Tensor):
        held = _rows(held, file, reading)
    elif isinstance(held, list):
        held = dict(enumerate(held))
    if not isinstance(held, Mapping) or not held:
        raise DataError(f"{file} holds {type(held).__name__}; expected vectors by layer, a list of them, or an array")
    layers = reading.layers or reading.edited
    if len(held) == 1 and layers is not None and (reading.layers is not None or _nameless(held)):
        if layers[1] - layers[0] >= _MOST_LAYERS:
            raise DataError(f"--layers {layers[0]}-{layers[1]} are more layers than any model has")
        vector = next(iter(held.values()))
        held = {layer - reading.offset: vector for layer in range(layers[0], layers[1] + 1)}
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


def _nameless(vectors: Mapping[Any, Any]) -> bool:
    """Whether a single entry's name says no layer."""
    return not re.search(r"[0-9]", str(next(iter(vectors))))


def _rows(array: torch.Tensor, file: str, reading: Reading) -> dict[Any, torch.Tensor]:
    if array.ndim == 1 or (array.ndim == 2 and array.shape[0] == 1):
        if reading.layers is None and reading.edited is None:
            raise DataError(
                f"{file} holds a single vector of {array.shape[-1]} numbers; say with --layers where it goes"
            )
        return {"vector": array}
    if array.ndim != 2:
        raise DataError(
            f"{file} holds an array of the shape {list(array.shape)}; expected [layers, hidden] or [hidden]"
        )
    return dict(enumerate(array))


def _place(name: Any, offset: int) -> tuple[str, str]:
    """The place that an entry's name stands for, and what is wrong with it."""
    text = str(name)
    numbers = re.findall(r"[0-9]+", text)
    if len(numbers) != 1 or len(numbers[0]) > _MOST_DIGITS:
        return "", f"{brief(text)} names no single layer"
    layer = int(numbers[0]) + offset
    if _ELSEWHERE.search(text):
        return "", f"{text} is neither the stream after a block nor a writer's output"
    if "resid_pre" in text:
        layer -= 1
    if layer < -1:
        return "", f"{text} would lie before the first block"
    role = "attn_out" if _ATTENTION.search(text) else "mlp_out" if _MLP.search(text) else "residual"
    return f"{role}.{layer}", ""


IMPORTERS = (
    Importer(
        "SteeringVector files of the steering-vectors library and per-layer .pt",
        lambda source: source.format == "torch",
        _read_torch,
    ),
    Importer("per-layer .npz and .npy", lambda source: source.format == "numpy", _read_numpy),
    Importer("per-layer .safetensors", lambda source: source.format == "safetensors", _read_safetensors),
)
