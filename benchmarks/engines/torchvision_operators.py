"""Lets torchvision be imported beside a torch for CPUs, if its own compiled operators do not load there.

A wheel of torchvision that was built for CUDA asks for CUDA's libraries, and without them its import stops at
``operator torchvision::nms does not exist``. Here those that its import needs are declared, without code, before it is imported.
Resizing and normalising pictures needs neither. ``env_vllm.sh`` puts this file into vLLM's environment, with a line that
calls :func:`install` whenever Python starts: vLLM looks at its models in processes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Declaring(MetaPathFinder):
    """Finds no module itself: it declares the operators when torchvision is about to be imported."""

    library: object = None

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and self.library is None:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
            self.library = library
        return None


def install() -> None:
    """From now on the operators are declared before torchvision is imported. A second call changes nothing."""
    if not any(isinstance(finder, _Declaring) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Declaring())
