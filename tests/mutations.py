"""Mutations of sound files, each drawn from a seed: JSON values, bytes, safetensors headers, lines of text."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NESTED: Any = None
for _ in range(300):
    NESTED = [NESTED]
# what a JSON value may be replaced by
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "../../escape",
    "/etc/passwd",
    "a/b",
    "\x00",
    "\x1b[2J\x07",
    "\ud800",
    "\u202e",
    "x" * 5000,
    "<script>alert(1)</script>",
    "{{ 1/0 }}",
    "---\nlicense: x\n---",
    "NaN",
    "1",
    [],
    {},
    [[]],
    [None],
    [-1],
    [2**40, 2**40],
    {"a": 1},
    {"": {}},
    NESTED,
    list(range(300)),
]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, renamed, doubled or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(nodes(value)))
        if not path:
            if rng.random() < 0.1:
                return rng.choice(VALUES)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], rng.random()
        if kind < 0.6:
            holder[key] = json.loads(json.dumps(rng.choice(VALUES)))
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            name = rng.choice([text for text in VALUES if isinstance(text, str)] + list(holder))
            holder[name] = holder.pop(key)
        else:
            holder.insert(rng.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
    return value


def dump(value: Any, rng: random.Random) -> bytes:
    """JSON bytes, sometimes with a key twice or with something behind the end."""
    raw = json.dumps(value).encode()
    kind = rng.random()
    if kind < 0.04 and raw.startswith(b'{"'):
        end = raw.find(b",")
        return raw if end < 0 else raw[:end] + b"," + raw[1:]
    if kind < 0.06:
        return raw + rng.choice((b" ", b"\x00", b"{}", b"\xff", b"]"))
    if kind < 0.08:
        return b"[" * 100_000
    return json.dumps(value).encode("utf-16") if kind < 0.09 else raw


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, cut, doubled or put in."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, at = rng.random(), rng.randrange(len(data) + 1)
        if kind < 0.4 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            del data[at : at + rng.choice((1, 4, 64, len(data)))]
        elif kind < 0.8:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data))))
    return bytes(data)


def mutate_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header, the JSON in its metadata, its numbers or its bytes changed."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(raw, rng)
    metadata = header.get("__metadata__") or {}
    if kind < 0.6 and metadata:
        name = rng.choice(list(metadata))
        with contextlib.suppress(ValueError):
            metadata[name] = dump(mutate_json(json.loads(metadata[name]), rng), rng).decode("utf-8", "replace")
    elif kind < 0.75:
        values = bytearray(body)
        for _ in range(rng.choice((1, 5))):
            at = rng.randrange(max(1, len(values) // 4)) * 4
            values[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38, -1.0, 0.0, 1e-45)))
        body = bytes(values[: len(body)])
    elif kind < 0.85:
        # a tensor of another shape that takes the same bytes, or two that change places
        names = [name for name in header if name != "__metadata__"]
        entry = header[rng.choice(names)]
        shape = entry["shape"]
        count = 1
        for n in shape:
            count *= n
        entry["shape"] = rng.choice((shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1], [1, count]))
    else:
        header = mutate_json(header, rng)
    head = dump(header, rng)
    return struct.pack("<Q", len(head)) + head + body


def mutate_text(raw: bytes, rng: random.Random) -> bytes:
    """A file of JSON, one value or one a line, or of anything else."""
    if rng.random() < 0.2:
        return mutate_bytes(raw, rng)
    try:
        return dump(mutate_json(json.loads(raw), rng), rng)
    except ValueError:
        lines = raw.split(b"\n")
        at = rng.randrange(len(lines))
        try:
            lines[at] = dump(mutate_json(json.loads(lines[at]), rng), rng)
        except ValueError:
            return mutate_bytes(raw, rng)
        return b"\n".join(lines)


def mutate_file(path: Path, rng: random.Random) -> None:
    """Change a file in place; now and then into something that is no file."""
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        special = rng.choice(("fifo", "folder", "loop", "device", "nothing", "absent"))
        if special == "fifo":
            os.mkfifo(path)
        elif special == "folder":
            path.mkdir()
        elif special != "absent":
            path.symlink_to({"loop": path.name, "device": "/dev/zero", "nothing": "nowhere"}[special])
        return
    raw = path.read_bytes()
    path.write_bytes((mutate_safetensors if path.suffix == ".safetensors" else mutate_text)(raw, rng))
