"""The plain view of a quantised checkpoint: each matrix by its name, read as the numbers it stands for.

fp8 with block scales has a module of its own (``checkpoint.fp8``), since it is edited and written too. mxfp4 experts stay packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from steer2edit.checkpoint import awq, bitsandbytes, compressed_tensors, gptq
from steer2edit.checkpoint.reader import Checkpoint, Quantisation
from steer2edit.errors import CheckpointError, first_line

_READ = {
    "bitsandbytes": bitsandbytes.packed_matrices,
    "gptq": gptq.packed_matrices,
    "awq": awq.packed_matrices,
    "compressed-tensors": compressed_tensors.packed_matrices,
    "fbgemm_fp8": compressed_tensors.packed_matrices,
}
READ = tuple(_READ)
"""The values of quant_method whose matrices are read."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quant_method that a config names; None without one.

    Old configs of bitsandbytes name none, and say how many bits.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method = settings.get("quant_method")
    return method if isinstance(method, str) else None


def plain_view(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised matrices under their own names.

    It is the same one where none is in a format that is read.
    Raises CheckpointError where a matrix lacks a part, or its parts do not fit together.
    """
    method = method_of(checkpoint.config)
    read = _READ.get(method or "")
    if read is None:
        return checkpoint
    settings = checkpoint.config["quantization_config"]
    stored = checkpoint.tensors
    if method == "fbgemm_fp8":
        settings = {"format": "float-quantized"}
    try:
        found, text = read(settings, stored, checkpoint.read)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path} is quantised ({method}): {first_line(error)}") from None
    if not found:
        return checkpoint
    parts = {source.name for info in found.values() if info.packed is not None for source in info.packed.sources}
    plain = {name: info for name, info in stored.items() if name not in parts} | found
    return replace(checkpoint, tensors=plain, stored=stored, quantisation=Quantisation(text, len(found)))
