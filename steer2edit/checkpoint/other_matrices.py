"""A quantised checkpoint that reads its matrices from the unquantised model, for planning.

Names, fingerprint and content stay those of the quantised model, which a plan is made for; norms and biases are read from it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from steer2edit.checkpoint.header import EDITABLE, TensorInfo
from steer2edit.checkpoint.reader import Checkpoint
from steer2edit.errors import CheckpointError, listing

LARGEST_DIFFERENCE = 0.7
"""Of a matrix from its rounded copy, relative to it. Other matrices are at 1.4."""
_RESCALED = 0.6
"""How much of the difference is left, at most, where inputs were rescaled and nothing else was done."""
_NOTABLE = 0.05


@dataclass(frozen=True)
class Elsewhere:
    """A matrix whose bytes are ``sources``, and whose numbers are read from ``other``."""

    sources: tuple[TensorInfo, ...]
    other: Checkpoint
    info: TensorInfo

    def decoder(self, read: Callable[[TensorInfo], torch.Tensor]) -> Callable[[int, int], torch.Tensor]:
        """Rows in the dtype of the other checkpoint."""
        return lambda first, count: self.other.read(self.info.rows(first, count))


@dataclass(frozen=True)
class Rounding:
    """How far a quantised matrix Q is from the unquantised W.

    ``difference`` is ``‖Q - W‖ / ‖W‖``, and ``rescaled`` what is left of it where each column of W has its own factor.
    """

    tensor: str
    difference: float
    rescaled: float


def rounding(quantised: Checkpoint, unquantised: Checkpoint, name: str) -> Rounding:
    """How far one matrix of the two is apart. Both are read in blocks."""
    ours, theirs = quantised.tensors[name], unquantised.tensors[name]
    rows, columns = ours.shape
    step = max(1, (1 << 22) // (4 * columns))
    squares, crossed, own = (torch.zeros(columns, dtype=torch.float64) for _ in range(3))
    assert ours.packed is not None
    decode = ours.packed.decoder(quantised.read)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        W, Q = unquantised.read(theirs.rows(first, count)).double(), decode(first, count).double()
        squares += W.square().sum(0)
        own += Q.square().sum(0)
        crossed += (W * Q).sum(0)
    whole = float(squares.sum().clamp(min=1e-30))
    left = own - crossed.square() / squares.clamp(min=1e-30)
    apart = float((own - 2 * crossed + squares).sum().clamp(min=0))
    return Rounding(name, (apart / whole) ** 0.5, (float(left.sum().clamp(min=0)) / whole) ** 0.5)


def with_matrices_of(quantised: Checkpoint, unquantised: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The quantised checkpoint with its packed matrices read from the unquantised one.

    ``names`` are the matrices to compare first. Raises CheckpointError where shapes differ, or a matrix is not what the quantised
    one was rounded from.
    """
    packed = {name: info for name, info in quantised.tensors.items() if info.packed is not None}
    problems = []
    for name, info in packed.items():
        other = unquantised.tensors.get(name)
        if other is None:
            problems.append(f"{name} is missing")
        elif other.shape != info.shape or other.dtype not in EDITABLE:
            problems.append(
                f"{name} is {other.dtype} {list(other.shape)}; expected an unquantised matrix of {list(info.shape)}"
            )
    if problems:
        raise CheckpointError(
            f"{unquantised.name} is not the unquantised form of {quantised.name} (--weights):\n{listing(problems)}"
        )
    compared = [rounding(quantised, unquantised, name) for name in names if name in packed]
    turned = [one for one in compared if one.difference > _NOTABLE and one.rescaled < _RESCALED * one.difference]
    far = [one for one in compared if not one.difference <= LARGEST_DIFFERENCE]
    if len(turned) > len(compared) // 2:
        raise CheckpointError(
            f"{quantised.name} has other scales of inputs than {unquantised.name}: {len(turned)} of {len(compared)} matrices "
            f"differ, such as {turned[0].tensor} by {turned[0].difference:.2f}, and by {turned[0].rescaled:.2f} once each input "
            "has its own scale. AWQ does so, and its inputs are divided by the same scales when it runs: what is captured there "
            "does not fit these matrices. Leave --weights out: the plan is then computed from the numbers that the quantised "
            "matrices stand for."
        )
    if far:
        raise CheckpointError(
            f"{quantised.name} was not quantised from {unquantised.name} (--weights):\n"
            + listing(f"{one.tensor} differs by {one.difference:.2f} of its norm" for one in far)
        )
    assert quantised.quantisation is not None
    origin = {
        "name": unquantised.name,
        "revision": unquantised.revision,
        "fingerprint": unquantised.fingerprint,
        "largest_difference": round(max((one.difference for one in compared), default=0.0), 4),
    }
    tensors = dict(quantised.tensors)
    for name, info in packed.items():
        assert info.packed is not None
        other = unquantised.tensors[name]
        tensors[name] = replace(other, shard=info.shard, packed=Elsewhere(info.packed.sources, unquantised, other))
    return replace(quantised, tensors=tensors, quantisation=replace(quantised.quantisation, weights=origin))
