"""Selective Steering (arXiv 2601.19375): its hooks turn what the norms before attention and MLP give, in a plane."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from operator_rows.row import ADAPTERS, EXACT, Hook, Row
from operator_rows.subject import Subject

NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gpt2": ("ln_1", "ln_2"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
}


def _plane(subject: Subject, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The direction after a block, and the mean stream without it, each of length one."""
    statistics, layers = subject.statistics, range(subject.spec.layers)
    first = statistics.difference(f"residual.{layer}")
    first = first / first.norm()
    means = [
        sum(statistics.mean(f"residual.{i}", "output", label) for label in ("positive", "negative")) for i in layers
    ]
    other = sum(torch.as_tensor(mean) / torch.as_tensor(mean).norm() for mean in means)
    other = torch.as_tensor(other) - (other @ first) * first
    return first, other / other.norm()


def _turning(subject: Subject, degrees: float) -> Mapping[str, Hook]:
    first, second = _plane(subject, 1)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def turn(n: torch.Tensor) -> torch.Tensor:
        a, b = n @ first, n @ second
        inside = a[..., None] * first + b[..., None] * second
        return n - inside + (c * a + s * b)[..., None] * first + (c * b - s * a)[..., None] * second

    def hook_of(name: str) -> Hook:
        norm = subject.loaded.model.get_submodule(name)
        gain = norm.weight.double() + (1 if subject.family == "gemma2" else 0)
        bias = norm.bias.double() if getattr(norm, "bias", None) is not None else torch.zeros_like(gain)
        return lambda _x, y: gain * turn((y - bias) / gain) + bias

    # the layers of the command; the tiny models have no others
    blocks = [f"{subject.spec.block_modules}{layer}" for layer in range(min(subject.spec.layers, 3))]
    return {f"{block}.{norm}": hook_of(f"{block}.{norm}") for block in blocks for norm in NORMS[subject.family]}


_SYSTEM, _COMMAND = (
    "Selective Steering (2601.19375)",
    "--method rotation --angle 40 --direction-layer 1 --second-axis mean --layers 0-2",
)
ROWS = (
    Row(
        _SYSTEM,
        "g ⊙ R n + b for a norm's output g ⊙ n + b: the reads are turned, the stream is not",
        _COMMAND,
        "a forward hook on every norm before attention and MLP turns its output in the plane",
        lambda subject: _turning(subject, 40),
        carried=ADAPTERS,
        families=("llama",),
    ),
    Row(
        _SYSTEM,
        "the same before the readers of a family with norms behind its writers too",
        _COMMAND.replace("40", "35").replace("0-2", "0-1"),
        "a forward hook on every norm before attention and MLP turns its output in the plane",
        lambda subject: _turning(subject, 35),
        carried=ADAPTERS,
        families=("gemma2",),
    ),
    Row(
        _SYSTEM,
        "the same with LayerNorms, whose bias is corrected in the readers' biases",
        _COMMAND.replace("40", "25").replace("0-2", "0-1"),
        "a forward hook on every norm before attention and MLP turns its output in the plane",
        lambda subject: _turning(subject, 25),
        carried={"checkpoint": EXACT, "lora": EXACT},
        families=("gpt2",),
    ),
)
