"""How far an edit moves the model on text that has nothing to do with the behaviour, and the strength that meets a budget.

The measure is the mean over all tokens of KL(base ‖ edited), in nats. The base's final hidden states are kept (a row
per token), so each further measurement costs one pass of the body and two of the unembedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.errors import DataError, Steer2EditError
from steer2edit.model import LoadedModel, batches, pad_right
from steer2edit.progress import Progress, silent

_CHUNK = 256


@dataclass(frozen=True)
class Divergence:
    """``kl`` in nats per token with ``stderr``, over ``tokens``; perplexities of both models on the same tokens."""

    kl: float
    stderr: float
    tokens: int
    base_perplexity: float
    perplexity: float


@dataclass(frozen=True)
class Strength:
    """The strength found, what it measured, and the search's ``(strength, kl)`` steps in order."""

    strength: float
    divergence: Divergence
    steps: tuple[tuple[float, float], ...]


class NeutralText:
    """The base model's view of a neutral text; :meth:`measure` compares the model as it is now with it.

    ``text`` is one running text, or several documents that are read each by itself, in windows of ``window`` tokens.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        text: str | Sequence[str],
        *,
        max_tokens: int = 4096,
        window: int = 256,
        batch_tokens: int = 2048,
        progress: Progress = silent,
    ) -> None:
        self._loaded = loaded
        self._progress = progress
        self._windows = _windows(loaded, [text] if isinstance(text, str) else list(text), max_tokens, window)
        if self.tokens < 16:
            raise DataError(f"the neutral text has {self.tokens} tokens; expected at least a few hundred")
        self._batches = batches([len(one) for one in self._windows], batch_tokens)
        self._targets = torch.cat([torch.tensor(self._windows[i][1:]) for batch in self._batches for i in batch])
        self._base = torch.cat(list(self._hidden("base on neutral text"))).cpu()

    @property
    def tokens(self) -> int:
        """Predictions that are compared."""
        return sum(len(window) - 1 for window in self._windows)

    def measure(self) -> Divergence:
        """Compare the model, with whatever hooks are on it, with the base."""
        kls, base_loss, loss = [], 0.0, 0.0
        at = 0
        for hidden in self._hidden("KL on neutral text"):
            for now in torch.split(hidden, _CHUNK):
                rows = slice(at, at + len(now))
                at = rows.stop
                gold = self._targets[rows, None].to(now.device)
                p = self._log_probabilities(self._base[rows].to(now.device))
                q = self._log_probabilities(now)
                base_loss -= float(p.gather(1, gold).sum())
                loss -= float(q.gather(1, gold).sum())
                q.sub_(p).neg_()
                kls.append(p.exp_().mul_(q).sum(1).double().cpu())
        every = torch.cat(kls)
        count = len(every)
        return Divergence(
            kl=float(every.mean()),
            stderr=float(every.std() / math.sqrt(count)),
            tokens=count,
            base_perplexity=math.exp(min(base_loss / count, 700)),
            perplexity=math.exp(min(loss / count, 700)),
        )

    def _hidden(self, stage: str) -> Iterator[torch.Tensor]:
        """Batch by batch, the final hidden states [predictions, hidden] that predict a next token."""
        pad = self._loaded.tokenizer.pad_token_id or 0
        with self._progress(stage, total=self.tokens) as advance, torch.inference_mode():
            for chosen in self._batches:
                windows = [self._windows[i] for i in chosen]
                ids, mask = pad_right(windows, pad, self._loaded.device)
                states = self._loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                yield torch.cat([row[: len(one) - 1] for row, one in zip(states, windows, strict=True)])
                advance(sum(map(len, windows)) - len(windows))

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        # the model's own forward with its body replaced: whatever the family does to logits is done here too
        body = self._loaded.body()
        with torch.inference_mode(), _returning(body, hidden[None]):
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits = self._loaded.model(input_ids=ids, use_cache=False).logits[0]
            return torch.log_softmax(logits.float(), dim=-1)


def find_strength(
    measure: Callable[[float], Divergence],
    budget: float,
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    max_steps: int = 12,
) -> Strength:
    """The largest strength whose measured KL stays within ``budget``, to ``tolerance`` of the budget.

    KL grows about as the square of the strength, so each guess follows the power law through the last measurement
    and falls back to bisection inside the bracket. Raises Steer2EditError where no strength meets the budget.
    """
    if not budget > 0:
        raise Steer2EditError(f"the KL budget is {budget}, expected a positive number of nats per token")
    low: tuple[float, Divergence] | None = None
    high: tuple[float, float] | None = None
    steps: list[tuple[float, float]] = []
    strength = start
    for _ in range(max_steps):
        found = measure(strength)
        steps.append((strength, found.kl))
        if not math.isfinite(found.kl) and strength < 1e-6:
            break
        if found.kl <= budget:
            low = (strength, found)
            if found.kl >= (1 - tolerance) * budget:
                break
        else:
            high = (strength, found.kl)
        strength = _next(low, high, budget)
    if low is None:
        raise Steer2EditError(
            f"no strength met the KL budget of {budget}: {steps[-1][0]:.3g} still gave {steps[-1][1]:.3g}; "
            "is the neutral text or the data damaged?"
        )
    return Strength(low[0], low[1], tuple(steps))


def _next(low: tuple[float, Divergence] | None, high: tuple[float, float] | None, budget: float) -> float:
    # aimed a little under the budget, so that a good guess ends the search
    goal = 0.975 * budget
    points = ([(low[0], low[1].kl)] if low else []) + ([high] if high else [])
    if len(points) == 2:
        (a, ka), (b, kb) = points
        power = math.log(max(kb, 1e-30) / max(ka, 1e-30)) / math.log(b / a)
        guess = a * (goal / max(ka, 1e-30)) ** (1 / max(power, 0.25))
        inside = a + 0.05 * (b - a), b - 0.05 * (b - a)
        return guess if inside[0] <= guess <= inside[1] else math.sqrt(a * b)
    at, kl = points[0]
    if not math.isfinite(kl):
        return at / 16
    return at * min(max(math.sqrt(goal / max(kl, 1e-12)), 1 / 64), 64.0)


def _windows(loaded: LoadedModel, texts: list[str], max_tokens: int, window: int) -> list[list[int]]:
    windows: list[list[int]] = []
    left = max_tokens
    for ids in loaded.tokenizer(texts, verbose=False)["input_ids"]:
        kept = ids[: max(left, 0)]
        left -= len(kept)
        # every window begins as a text does: some models are lost without their BOS
        start = kept[:1] if kept[:1] == [loaded.tokenizer.bos_token_id] else []
        body = kept[len(start) :]
        windows += [start + body[i : i + window] for i in range(0, len(body), window) if len(body) - i > 1 or start]
    return windows


@contextmanager
def _returning(body: Any, hidden: torch.Tensor) -> Iterator[None]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    body.forward = lambda *_args, **_kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del body.forward
