"""Messages between this process and a child: plain values and dense tensors as bytes, without pickle.

A message is a safetensors file in memory where it has tensors, and JSON alone where it has none. Lists, tuples and
dictionaries are tagged, because JSON knows neither tuples nor keys other than texts.
"""

from __future__ import annotations

import base64
import json
from typing import Any

_DEEPEST = 100


def pack(value: Any) -> bytes:
    """A value as bytes. Raises TypeError for what is not a plain value, and ValueError where it nests too deeply."""
    tensors: list[Any] = []
    text = json.dumps(_tagged(value, tensors, 0), ensure_ascii=True)
    if not tensors:
        return b"J" + text.encode()
    from safetensors.torch import save

    return b"T" + save({str(i): tensor for i, tensor in enumerate(tensors)}, {"value": text})


def unpack(raw: bytes) -> Any:
    """What :func:`pack` was given."""
    if raw[:1] == b"J":
        return _plain(json.loads(raw[1:]), {})
    from safetensors.torch import load

    length = int.from_bytes(raw[1:9], "little")
    header = json.loads(raw[9 : 9 + length])
    return _plain(json.loads(header["__metadata__"]["value"]), load(raw[1:]))


def _tagged(value: Any, tensors: list[Any], depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError("it nests too deeply")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, bytes):
        return ["b", base64.b64encode(value).decode()]
    if isinstance(value, (list, tuple)):
        return ["l" if isinstance(value, list) else "t", *(_tagged(one, tensors, depth + 1) for one in value)]
    if isinstance(value, dict):
        return [
            "d",
            *([_tagged(key, tensors, depth + 1), _tagged(one, tensors, depth + 1)] for key, one in value.items()),
        ]
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().contiguous().clone())
        return ["x", len(tensors) - 1]
    raise TypeError(f"{type(value).__name__} is not a plain value")


def _plain(value: Any, tensors: dict[str, Any]) -> Any:
    if not isinstance(value, list):
        return value
    tag, *rest = value
    if tag == "b":
        return base64.b64decode(rest[0])
    if tag == "x":
        return tensors[str(rest[0])]
    if tag == "d":
        return {_plain(key, tensors): _plain(one, tensors) for key, one in rest}
    items = [_plain(one, tensors) for one in rest]
    return items if tag == "l" else tuple(items)
