"""The engine that is always there: the loaded model in this process, in batches.

Each answer is drawn by a generator of its own, so that it does not depend on what else is in its batch.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import token_ids
from steer2edit.engines.engine import Answer, Request, Sampling, yes_share
from steer2edit.engines.generation import Choose, answered_rows
from steer2edit.engines.rendering import Rendering, answer_tokens, by_room
from steer2edit.errors import DataError
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import LoadedModel

BATCH = 64
"""Answers that are written at a time."""
_YES_TOKENS = 8192
"""Tokens of prompts that are read at a time for a yes or no."""
_LIKELIEST = 256
"""Among so many likeliest tokens those of top_p are looked for first."""


class TransformersEngine:
    """Answers of a loaded model, under whatever hooks are on it.

    ``chat_template_kwargs`` and ``think`` are those of :class:`~steer2edit.engines.rendering.Rendering`. ``batch_size`` bounds
    the answers that are written at a time.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        chat_template_kwargs: TemplateArguments | None = None,
        think: bool = False,
        batch_size: int = BATCH,
        name: str | None = None,
    ) -> None:
        self.loaded = loaded
        self._rendering = Rendering(loaded.tokenizer, chat_template_kwargs, think)
        self._batch_size = batch_size
        self._name = name or (loaded.folder.name if loaded.folder is not None else type(loaded.model).__name__)

    def described(self) -> dict[str, Any]:
        """What answers: the model, its fingerprint, number type and device, and the versions."""
        import transformers

        return {
            "engine": "transformers",
            "model": self._name,
            "fingerprint": self.loaded.fingerprint,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": self.loaded.device.type,
            "chat_template_kwargs": dict(self._rendering.arguments or {}),
            "think": self._rendering.think,
            "versions": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        """Each request's number and answer, as answers end, the shortest prompts first.

        Raises DataError where a prompt cannot be rendered or leaves no room for an answer.
        """
        texts = self._rendering.texts(requests, answering=True)
        rows = self._rendering.rows(texts)
        self.loaded.check_tokens(rows)
        with progress("write answers", total=len(requests)) as advance:
            for limit, chosen in by_room(rows, sampling.max_new_tokens, self.loaded.context).items():
                choose = _choosing([requests[i] for i in chosen], sampling, limit) if sampling.temperature else None
                prompts = [rows[i] for i in chosen]
                rows_written = answered_rows(
                    self.loaded, prompts, limit, self._batch_size, choose, sampling.repetition_penalty
                )
                for place, row in rows_written:
                    index = chosen[place]
                    ended = len(row) < limit
                    answer = self._rendering.answer(requests[index], texts[index], rows[index], row, ended)
                    advance(1)
                    yield index, answer

    def yes(self, requests: Sequence[Request]) -> list[float]:
        """P(yes) / (P(yes) + P(no)), from one pass over each prompt; nan where neither is likely.

        Raises EngineError where the tokenizer has no token for one of the two.
        """
        rows = self._rendering.rows(self._rendering.texts(requests, answering=False))
        self.loaded.check_tokens(rows)
        if longest := [len(row) for row in rows if len(row) > self.loaded.context]:
            raise DataError(
                f"a question takes {max(longest)} tokens and the model's context is {self.loaded.context}: shorten it"
            )
        yes, no = answer_tokens(self.loaded.tokenizer)
        shares: dict[int, float] = {}
        for chosen in batches([len(row) for row in rows], _YES_TOKENS):
            ids, mask = pad_right([rows[i] for i in chosen], self.loaded.padding, self.loaded.device)
            with torch.inference_mode():
                states = self.loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                last = mask.sum(1).to(states.device) - 1
                logits = self.loaded.logits(states[torch.arange(len(chosen), device=states.device), last])
                found = logits.float().cpu().double().softmax(1)
            for index, row in zip(chosen, found, strict=True):
                shares[index] = yes_share(float(row[yes].sum()), float(row[no].sum()))
        return [shares[index] for index in range(len(rows))]

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has, without special tokens."""
        return len(token_ids(self.loaded.tokenizer, [text], False)[0])


def _likeliest(probabilities: torch.Tensor, total: float) -> torch.Tensor:
    """Which tokens of each row are the likeliest that together reach ``total``."""
    # sorting a whole vocabulary takes longer than the pass of a small model
    for count in (min(_LIKELIEST, probabilities.shape[1]), probabilities.shape[1]):
        ordered, tokens = probabilities.topk(count, dim=1)
        before = ordered.cumsum(1) - ordered
        if bool((before[:, -1] >= total).all()):
            break
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, tokens, before < total)


def _choosing(requests: Sequence[Request], sampling: Sampling, limit: int) -> Choose:
    """Draws each row's next token by the row's own generator.

    The token is where a uniform number falls in the running sum of the probabilities, in the order of the vocabulary: rounding
    moves it only where the number lies at an edge. ``top_p`` keeps the likeliest tokens that together reach it (Holtzman et
    al. 2019).
    """
    numbers = torch.stack(
        [
            torch.rand(limit, generator=torch.Generator().manual_seed(one.seed(sampling.seed)), dtype=torch.float64)
            for one in requests
        ]
    )

    def choose(indices: Sequence[int], step: int, logits: torch.Tensor) -> torch.Tensor:
        values = logits.float() if logits.device.type != "mps" else logits.float().cpu()  # which has no float64
        probabilities = (values.double() / sampling.temperature).softmax(1)
        if sampling.top_p < 1:
            probabilities = torch.where(_likeliest(probabilities, sampling.top_p), probabilities, 0.0)
        sums = probabilities.cumsum(1)
        drawn = numbers[list(indices), step].to(sums.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1).to(logits.device)

    return choose
