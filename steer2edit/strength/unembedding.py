"""Final states to distributions, and a base's distributions kept so that comparing others with them is cheap.

Where logits are an affine function of the final state, ``l(h) = W h + b``, the sum ``Σ_v p_v l_v(h)`` is ``(Wᵀp) · h + p · b``:
what must be kept of a distribution p is a row as wide as h. With ``g(h) = log Σ_v exp l_v(h) - Σ_v p_v l_v(h)`` then

    KL(p ‖ q) = g(h_q) - g(h_p),

exactly, for one unembedding in place of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from steer2edit.runtime.model import LoadedModel

_TOP = 32
"""So many of a distribution's likeliest tokens are kept apart: their logits are taken as the model rounds them."""
_BLOCK = 1 << 20
"""Bytes that stay in a core's cache: passes over fewer rows at a time are several times as fast."""
_VOCABULARY = 8192


@dataclass(frozen=True)
class Affine:
    """Logits as ``scale · (W h + b)``; ``weight`` [vocabulary, hidden] and ``bias`` in the model's own dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float

    def same(self, other: Affine | None) -> bool:
        """Whether ``other`` gives the same logits for the same states."""
        if other is None or self.scale != other.scale or (self.bias is None) != (other.bias is None):
            return False
        pairs = [(self.weight, other.weight), *([(self.bias, other.bias)] if self.bias is not None else [])]
        return all(a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device))) for a, b in pairs)  # type: ignore[union-attr]

    def expect(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``Wᵀ w`` and ``w · b`` of weights [n, vocabulary]: float32, [n, hidden] and [n]."""
        found = torch.zeros(len(weights), self.weight.shape[1], device=weights.device)
        offset = torch.zeros(len(weights), device=weights.device)
        for first in range(0, len(self.weight), _VOCABULARY):
            rows = slice(first, first + _VOCABULARY)
            found += weights[:, rows] @ self.weight[rows].to(weights)
            if self.bias is not None:
                offset += weights[:, rows] @ self.bias[rows].to(weights)
        return found.mul_(self.scale), offset.mul_(self.scale)


def affine(loaded: LoadedModel, states: torch.Tensor) -> Affine | None:
    """The model's unembedding as an affine map, tested on ``states`` [n, hidden].

    None where it is not affine, or not at hand.

    A family may cap its logits or do anything else to them: what counts is that the numbers agree, at the states and at
    larger ones.
    """
    module = loaded.model.get_output_embeddings()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    tried = torch.cat([states[:4], 4 * states[:4]])
    if weight.shape[1] != tried.shape[1]:
        return None
    plain = torch.cat([tried.float() @ part.float().T for part in torch.split(weight, _VOCABULARY)], dim=1)
    plain += 0 if bias is None else bias.float()
    logits = loaded.logits(tried).float()
    if logits.shape != plain.shape:
        return None
    scale = float((logits * plain).sum() / plain.square().sum())
    rounding = 1e-5 if weight.dtype is torch.float32 else 1e-2
    if not float((logits - scale * plain).abs().max()) <= rounding * float(logits.abs().max()):
        return None
    # families scale by config values, in float32 this one is found to 1e-7
    return Affine(weight, bias, 1.0 if abs(scale - 1) < 1e-3 else scale)


@dataclass(frozen=True)
class Reference:
    """A base's distributions p at n positions, as KL(p ‖ q) needs them.

    The likeliest tokens ``top`` [n, k] of p count one by one with their ``weights``, so that their logits are taken as the model
    rounds them; all others count through the state: ``tail`` [n, hidden] and ``offset`` [n] are ``Wᵀ p`` and ``p · b`` of these.
    ``gap`` [n] is g of the base's own states, ``loss`` [n] the base's negative log-probability of the tokens that follow.
    """

    unembedding: Affine
    tail: torch.Tensor
    offset: torch.Tensor
    top: torch.Tensor
    weights: torch.Tensor
    gap: torch.Tensor
    loss: torch.Tensor

    @classmethod
    def of(cls, unembedding: Affine, states: torch.Tensor, logits: torch.Tensor, gold: torch.Tensor) -> Reference:
        """From the base's final states [n, hidden], its logits [n, vocabulary] and the tokens that follow, [n]."""
        p = torch.softmax(logits.float(), dim=1)
        weights, top = p.topk(min(_TOP, p.shape[1]), dim=1)
        tail, offset = unembedding.expect(p.scatter_(1, top, 0.0))
        zero = torch.zeros_like(offset)
        found = cls(unembedding, tail, offset, top, weights, zero, zero)
        # by the same sums as later, so that a model that did not change has a KL of 0
        gap, _, loss, _ = found.compare(states, logits, gold).unbind(1)
        return replace(found, gap=gap, loss=loss)

    @classmethod
    def join(cls, parts: Sequence[Reference]) -> Reference:
        """References of the same unembedding, one after another."""
        tensors = [field.name for field in fields(cls) if field.name != "unembedding"]
        return cls(parts[0].unembedding, *(torch.cat([getattr(part, name) for part in parts]) for name in tensors))

    def __getitem__(self, rows: slice) -> Reference:
        tensors = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "unembedding"}
        return replace(self, **tensors)

    def compare(self, states: torch.Tensor, logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """For other states and their logits at the same positions [n, 4]: KL, the base's loss, this loss, and nothing."""
        total = torch.cat([torch.logsumexp(part.float(), dim=1) for part in _blocks(logits)])
        expected = torch.linalg.vecdot(self.tail, states.float()) + self.offset
        expected += logits.gather(1, self.top).float().mul_(self.weights).sum(1)
        loss = total - logits.gather(1, gold[:, None])[:, 0].float()
        return torch.stack((total - expected - self.gap, self.loss, loss, torch.zeros_like(loss)), dim=1)


def compare(base: torch.Tensor, logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """KL, both losses and the quadratic form of KL, [n, 4], from both models' logits.

    The logits are [n, vocabulary]. The losses are the base's, then the other's.
    """
    found = []
    for a, b, tokens in zip(_blocks(base), _blocks(logits), _blocks(gold[:, None], base), strict=True):
        p, q = torch.log_softmax(a.float(), dim=1), torch.log_softmax(b.float(), dim=1)
        losses = [-one.gather(1, tokens)[:, 0] for one in (p, q)]
        difference = p.sub(q)
        weighted = p.exp_().mul_(difference)
        kl = weighted.sum(1)
        quadratic = (weighted.mul_(difference).sum(1) - kl.square()) / 2
        found.append(torch.stack((kl, *losses, quadratic), dim=1))
    return torch.cat(found)


def token_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 log-probabilities [n] of ``tokens`` [n] under logits [n, vocabulary]."""
    total = torch.cat([torch.logsumexp(part.float(), dim=1) for part in _blocks(logits)])
    return logits.gather(1, tokens[:, None])[:, 0].float() - total


def _blocks(rows: torch.Tensor, like: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Rows in pieces that fit a core's cache.

    A piece holds as many as ``like``'s need. On other devices than a CPU, all rows are one piece.
    """
    width = (rows if like is None else like).shape[1]
    return torch.split(rows, max(1, _BLOCK // (4 * width)) if rows.device.type == "cpu" else len(rows))
