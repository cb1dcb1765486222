"""The KL of an edit from the base on neutral text, which has nothing to do with the behaviour.

Neutral text is prose, or a model's own answers to prompts; of answers only their own tokens count, under the prompt before
them. The measure is the mean over all tokens of KL(base ‖ edited), in nats. What is kept of the base is a row as wide as a hidden
state per token, and a measurement costs little more than a forward pass (``unembedding.py``); where logits are not an
affine function of the states, or the unembedding is another one, the base's logits are computed again from its kept states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.bootstrap import estimate
from steer2edit.data.templates import templated
from steer2edit.data.tokens import windows
from steer2edit.engines.own_answers import OwnAnswer
from steer2edit.errors import DataError
from steer2edit.notices import notice
from steer2edit.plan.measured import KL_NAMES, Divergence, TextKind
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.unembedding import Affine, Reference, affine, compare

MAX_TOKENS = 4096
WINDOW = 128
_CHUNK = 256
_GLANCE = 512
_FEWEST = 16


@dataclass(frozen=True)
class Windows:
    """What was measured of each window or answer: sums over its predictions, in nats; see :class:`Divergence`."""

    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    base_loss: tuple[float, ...]
    loss: tuple[float, ...]
    quadratic: tuple[float, ...] | None = None

    def divergence(self) -> Divergence:
        """The text's divergence; tokens of one row are not independent draws, so the interval is over windows or answers."""
        kl = estimate(self.kl, self.tokens)
        count = sum(self.tokens)
        base, now = (math.exp(min(sum(losses) / count, 700)) for losses in (self.base_loss, self.loss))
        quadratic = None if self.quadratic is None else sum(self.quadratic) / count
        return Divergence(kl.value, kl.low, kl.high, count, base, now, quadratic)


class NeutralText:
    """The base model's view of a neutral text; :meth:`measure` compares the model as it is now with it.

    ``text`` is one running text, or several documents that are read each by itself, in windows of ``window`` tokens and at most
    ``max_tokens`` in all; or answers, which are read whole. ``kind`` says which: prose, or answers in chat or in plain text.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        text: str | Sequence[str] | Sequence[OwnAnswer],
        *,
        max_tokens: int = MAX_TOKENS,
        window: int = WINDOW,
        batch_tokens: int = 2048,
        progress: Progress = silent,
    ) -> None:
        self._loaded = loaded
        self._progress = progress
        answers = [] if isinstance(text, str) else [one for one in text if isinstance(one, OwnAnswer)]
        self.kind: TextKind = "prose"
        if answers:
            self.kind = "chat" if templated(loaded.tokenizer) else "answers"
        self.stage = KL_NAMES[self.kind]
        if answers:
            self._rows = [list(one.ids) for one in answers]
            self._starts = [one.start for one in answers]
        else:
            texts = [text] if isinstance(text, str) else [one for one in text if isinstance(one, str)]
            self._rows = windows(loaded.tokenizer, texts, max_tokens, min(window, loaded.context))
            self._starts = [1] * len(self._rows)
        if self.tokens < _FEWEST:
            raise DataError(f"the neutral text has {self.tokens} tokens; expected at least a few hundred")
        loaded.check_tokens(self._rows)
        self._batches = self._ordered(batch_tokens)
        order = [i for batch in self._batches for i in batch]
        self._targets = torch.cat([torch.tensor(self._rows[i][self._starts[i] :]) for i in order])
        self._owners = torch.tensor([i for i in order for _ in range(self._count(i))])
        self._base, self._reference = self._look(progress)

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The token ids of each window, or of each prompt with its answer."""
        return [tuple(row) for row in self._rows]

    @property
    def tokens(self) -> int:
        """Predictions that are compared."""
        return sum(map(self._count, range(len(self._rows))))

    def measure(self, loaded: LoadedModel | None = None, *, glance: bool = False, stage: str = "") -> Divergence:
        """Compare the model, with whatever hooks are on it, with the base; or another model, of the same tokens.

        A ``glance`` takes a few windows or answers alone, some 500 tokens. ``stage`` is the name that progress shows.
        """
        return self.windows(loaded, glance=glance, stage=stage).divergence()

    def windows(
        self,
        loaded: LoadedModel | None = None,
        *,
        glance: bool = False,
        stage: str = "",
        progress: Progress | None = None,
    ) -> Windows:
        """The same, window by window. ``progress`` stands in for the text's own."""
        progress = silent if glance else self._progress if progress is None else progress
        loaded = self._loaded if loaded is None else loaded
        chosen = self._glanced() if glance else self._batches
        at = self.tokens - sum(self._count(i) for batch in chosen for i in batch)
        reference = None if glance else self._reference
        if reference is not None and not self.is_of(loaded):
            reference = reference if reference.unembedding.same(affine(loaded, self._base)) else None
        head = self._loaded.model.get_output_embeddings()
        if head is not None and head._forward_hooks:  # the unembedding itself is edited: the base's is needed beside it
            reference = None
        compared: list[torch.Tensor] = []
        first = at
        for hidden in self._hidden(stage or self.stage, loaded, chosen, progress):
            targets = self._targets[at : at + len(hidden)].to(hidden.device)
            for now, gold in zip(torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True):
                rows = slice(at, at + len(now))
                at = rows.stop
                logits = loaded.logits(now)
                if reference is None:
                    with _unhooked(head):
                        base = self._loaded.logits(self._base[rows].to(now.device))
                    found = compare(base, logits, gold)
                else:
                    found = reference[rows].compare(now, logits, gold)
                compared.append(found)
        return self._summed(torch.cat(compared), chosen, first, glance)

    def unchanged(self) -> Windows:
        """What :meth:`windows` gives of the base itself: known since the first look at it, where logits are affine."""
        if self._reference is None:
            return self.windows()
        nothing, loss = torch.zeros_like(self._reference.loss), self._reference.loss
        return self._summed(torch.stack((nothing, loss, loss, nothing), dim=1), self._batches)

    def is_of(self, loaded: LoadedModel) -> bool:
        """Whether it is this model's text: the base that others are compared with."""
        return loaded.model is self._loaded.model

    def _summed(
        self, compared: torch.Tensor, chosen: Sequence[Sequence[int]], first: int = 0, glance: bool = False
    ) -> Windows:
        """Sums over each row of ``chosen`` batches; ``compared`` has four numbers for each prediction, from ``first`` on."""
        # one transfer for the whole text: each would wait for the device
        numbers = compared.cpu().double()
        owners = self._owners[first : first + len(numbers)]
        sums = torch.zeros(len(self._rows), 4, dtype=torch.float64).index_add_(0, owners, numbers)
        kept = sorted(i for batch in chosen for i in batch)
        kl, base_loss, loss, quadratic = (tuple(column.tolist()) for column in sums[kept].T)
        tokens = tuple(map(self._count, kept))
        return Windows(tokens, kl, base_loss, loss, quadratic if glance else None)

    def _look(self, progress: Progress) -> tuple[torch.Tensor, Reference | None]:
        """The base's final states, and its distributions as KL needs them, where the unembedding allows that."""
        states: list[torch.Tensor] = []
        parts: list[Reference] = []
        unembedding: Affine | None = None
        at = 0
        for hidden in self._hidden(f"base, {self.stage}", self._loaded, self._batches, progress):
            if not states:
                unembedding = affine(self._loaded, hidden)
                if unembedding is None:
                    notice(
                        "the model's logits are not an affine map of its final states that lies in memory: the KL takes two "
                        "unembeddings for each token, and longer"
                    )
            states.append(hidden.cpu())
            for now in torch.split(hidden, _CHUNK) if unembedding is not None else ():
                gold = self._targets[at : at + len(now)].to(now.device)
                parts.append(Reference.of(unembedding, now, self._loaded.logits(now), gold))  # type: ignore[arg-type]
                at += len(now)
        return torch.cat(states), Reference.join(parts) if parts else None

    def _count(self, row: int) -> int:
        """Predictions of a row that are compared: those of the tokens from its start on."""
        return len(self._rows[row]) - self._starts[row]

    def _ordered(self, batch_tokens: int) -> list[list[int]]:
        """Batches of rows, longest first. Of answers, those of a quick look are in the last one, and of all lengths."""
        every = range(len(self._rows))
        fewest = max(1, round(_GLANCE * len(self._rows) / self.tokens))
        quick = list(every[:: max(1, len(self._rows) // fewest)])[:fewest] if self.kind != "prose" else []
        rest = [i for i in every if i not in quick]
        chosen = [[rest[i] for i in batch] for batch in batches([len(self._rows[i]) for i in rest], batch_tokens)]
        return [*chosen, *([quick] if quick else [])]

    def _glanced(self) -> list[list[int]]:
        """The last rows of the last batch.

        They are taken from its end, so that they stand at the end of the base's states too.
        """
        last = self._batches[-1]
        if self.kind != "prose":
            return [last]
        count, tokens = 0, 0
        while count < len(last) and tokens < _GLANCE:
            count += 1
            tokens += len(self._rows[last[-count]])
        return [last[-count:]]

    def _hidden(
        self, stage: str, loaded: LoadedModel, chosen_batches: Sequence[Sequence[int]], progress: Progress
    ) -> Iterator[torch.Tensor]:
        """Batch by batch, the final hidden states [predictions, hidden] that predict a next token."""
        pad = loaded.padding
        total = sum(self._count(i) for batch in chosen_batches for i in batch)
        with progress(stage, total=total) as advance, torch.inference_mode():
            for chosen in chosen_batches:
                ids, mask = pad_right([self._rows[i] for i in chosen], pad, loaded.device)
                states = loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                places = [slice(self._starts[i] - 1, len(self._rows[i]) - 1) for i in chosen]
                yield torch.cat([row[place] for row, place in zip(states, places, strict=True)])
                advance(sum(map(self._count, chosen)))


@contextmanager
def _unhooked(module: Any) -> Iterator[None]:
    """Within the block none of the module's forward hooks runs, if there is a module."""
    hooks = {} if module is None else dict(module._forward_hooks)
    if hooks:
        module._forward_hooks.clear()
    try:
        yield
    finally:
        if hooks:
            module._forward_hooks.update(hooks)
