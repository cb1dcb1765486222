"""A second device without its hardware: torch's meta device, and a mode that watches what passes between it and the CPU.

Numbers there do not exist. A tensor that is fetched holds zeros, so that laws are about transfers and devices alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steer2edit

PACKAGE = str(Path(steer2edit.__file__).parent)
aten: Any = torch.ops.aten
_COPIES = ("aten::_to_copy", "aten::to", "aten::copy_")
_NUMBERS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)


class SecondDevice(TorchDispatchMode):
    """Counts, by the line of the package behind it, each time the CPU waits for the device.

    Raises RuntimeError where one operation takes tensors of both devices; copies and numbers without axes are allowed.
    """

    name = "meta"

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [one for one in tensors if one.device.type == self.name]
        copies = func._schema.name in _COPIES
        if copies and there and "cpu" in (device.type for device in _destinations(args[1:], kwargs)):
            self._wait()
            dtypes = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)]
            return torch.zeros(args[0].shape, dtype=dtypes[0] if dtypes else args[0].dtype)
        if func in _NUMBERS and there:
            self._wait()
            return torch.zeros((), dtype=args[0].dtype).item()
        here = [one for one in tensors if one.device.type == "cpu" and one.dim()]
        if there and here and not copies:
            raise RuntimeError(f"{func} takes tensors of both devices")
        return func(*args, **kwargs)

    def _wait(self) -> None:
        frame: Any = sys._getframe()
        while frame is not None:
            file = frame.f_code.co_filename
            if "site-packages" in file and "/torch/" not in file:
                return  # a dependency's own wait
            if file.startswith(PACKAGE):
                self.waits[f"{Path(file).relative_to(PACKAGE)}:{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back


def _destinations(args: Any, kwargs: Any) -> list[torch.device]:
    """The devices that a copy's arguments name, itself or by a tensor on it."""
    given = [*args, *kwargs.values()]
    return [
        one if isinstance(one, torch.device) else one.device
        for one in given
        if isinstance(one, torch.device | torch.Tensor)
    ]
