"""Reading a JSON object from a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer2edit.errors import CheckpointError
from steer2edit.files.stand_ins import read_failure, stand_in
from steer2edit.files.untrusted import JSON_BYTES, parse_json, read_bytes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where the file is missing or holds something else."""
    try:
        raw = read_bytes(path, JSON_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {read_failure(path, error)}") from None
    try:
        value = parse_json(raw, unique=True)
    except ValueError as error:
        raise CheckpointError(stand_in(path) or f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value
