"""The number format that a model runs in where none is asked for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from steer2edit.checkpoint.json_file import read_json

_FAST = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")


def resolved_dtype(dtype: str, device: torch.device, folder: Path) -> str:
    """``dtype``; for ``auto`` the stored one (still ``auto``), or float32 on a CPU that is slow in it.

    A CPU is fast in bfloat16 where it has instructions for it, and in float32; float16 is slow on every CPU.
    """
    if dtype != "auto" or device.type != "cpu":
        return dtype
    return "auto" if stored_dtype(folder) == "bfloat16" and multiplies_bfloat16() else "float32"


def stored_dtype(folder: Path) -> str | None:
    """The dtype that a folder's config.json names; None where it names none."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(name := part.get(key), str):
                return name.removeprefix("torch.")
    return None


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16; False where torch cannot tell."""
    ask: Any = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    if ask is not None:
        capabilities = ask()
        return any(bool(capabilities.get(name)) for name in _FAST)
    older: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(older is not None and older())
