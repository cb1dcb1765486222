"""The mean effect of a plan's edits, added where each writer writes: what a vector for the stream stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steer2edit.architecture import Site
from steer2edit.plan import Bias, EditPlan, LowRank
from steer2edit.runtime.model import LoadedModel, device_of


@contextmanager
def mean_effects_added(loaded: LoadedModel, plan: EditPlan) -> Iterator[None]:
    """Within the block each edited writer's output is moved by its edit's mean effect, at every token.

    Behind a norm, a mean effect counts in root mean squares of the output. The edits are biases, and low-rank ones whose mean
    effect is known.
    """
    shifts: dict[str, torch.Tensor] = {}
    for edit in plan.edits:
        if isinstance(edit, LowRank) and edit.mean_effect is not None:
            shift = edit.B @ edit.mean_effect
        else:
            assert isinstance(edit, Bias), edit
            shift = edit.delta
        key = loaded.spec.owners[edit.tensor].key
        shifts[key] = shifts[key] + shift if key in shifts else shift
    with ExitStack() as stack:
        for key, shift in shifts.items():
            site = loaded.spec.site(key)
            handle = loaded.module(site).register_forward_hook(_shifting(site, shift))
            stack.callback(handle.remove)
        yield


def _shifting(site: Site, shift: torch.Tensor) -> Callable[..., Any]:
    def hook(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        moved = shift.to(device_of(module), torch.float32)
        if site.norm is not None:
            moved = moved * output.float().square().mean(dim=-1, keepdim=True).sqrt()
        return (output + moved).to(output.dtype)

    return hook
