"""The engine that is always there: the loaded model in this process, in batches.

Each answer is drawn by a generator of its own, so that it does not depend on what else is in its batch.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from steer2edit.data.prompts import Prompt
from steer2edit.data.template_trials import END_OF_THOUGHT
from steer2edit.data.templates import TemplateArguments, opens_thought, render_prompts, templated, thought_and_answer
from steer2edit.data.tokens import joined, texts_of, token_ids
from steer2edit.engines.engine import NO, YES, Answer, Request, Sampling, yes_share
from steer2edit.engines.generation import Choose, answered_rows
from steer2edit.errors import DataError, EngineError
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import LoadedModel

BATCH = 64
"""Answers that are written at a time."""
_YES_TOKENS = 8192
"""Tokens of prompts that are read at a time for a yes or no."""
_TAIL = 8
"""Tokens before an answer that its text is decoded with, where it continues a prefix: they decide about a first space."""


class TransformersEngine:
    """Answers of a loaded model, under whatever hooks are on it.

    With ``think`` the thought is left to a model that thinks, unless the template's arguments forbid one; without it an answer
    stands after an empty thought, unless the arguments ask for one. A request with a prefix never thinks: the prefix begins
    the answer. ``batch_size`` bounds the answers that are written at a time.
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
        self._arguments, self._think, self._batch_size = chat_template_kwargs, think, batch_size
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
            "chat_template_kwargs": dict(self._arguments or {}),
            "think": self._think,
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
        texts = self._texts(requests, answering=True)
        rows = token_ids(self.loaded.tokenizer, texts, self._special)
        self.loaded.check_tokens(rows)
        marks = _thought_marks(self.loaded.tokenizer)
        with progress("write answers", total=len(requests)) as advance:
            for limit, chosen in _by_room(rows, sampling.max_new_tokens, self.loaded.context).items():
                choose = _choosing([requests[i] for i in chosen], sampling, limit) if sampling.temperature else None
                prompts = [rows[i] for i in chosen]
                for place, row in answered_rows(self.loaded, prompts, limit, self._batch_size, choose):
                    index = chosen[place]
                    tail = rows[index][-_TAIL:] if requests[index].prefix else []
                    answer = self._answer(row, tail, len(row) < limit, opens_thought(texts[index]), marks)
                    advance(1)
                    yield index, answer

    def yes(self, requests: Sequence[Request]) -> list[float]:
        """P(yes) / (P(yes) + P(no)), from one pass over each prompt; nan where neither is likely.

        Raises EngineError where the tokenizer has no token for one of the two.
        """
        rows = token_ids(self.loaded.tokenizer, self._texts(requests, answering=False), self._special)
        self.loaded.check_tokens(rows)
        if longest := [len(row) for row in rows if len(row) > self.loaded.context]:
            raise DataError(
                f"a question takes {max(longest)} tokens and the model's context is {self.loaded.context}: shorten it"
            )
        yes, no = _answer_tokens(self.loaded)
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

    @property
    def _special(self) -> bool:
        return not templated(self.loaded.tokenizer)

    def _texts(self, requests: Sequence[Request], answering: bool) -> list[str]:
        """The rendered text before each answer, with the prefix that begins it."""
        groups: dict[tuple[str | None, bool], dict[Prompt, str]] = {}
        for number, request in enumerate(requests, start=1):
            key = (request.system, bool(request.prefix))
            groups.setdefault(key, {}).setdefault(request.prompt, f"request {number}")
        rendered: dict[tuple[str | None, bool, Prompt], str] = {}
        for (system, begun), places in groups.items():
            thinks = answering and not begun
            texts = render_prompts(
                places,
                self.loaded.tokenizer,
                system,
                self._arguments,
                writing=thinks,
                own_thought=thinks and self._think,
            )
            rendered |= {(system, begun, prompt): text for prompt, text in texts.items()}
        found = []
        for request in requests:
            text = rendered[request.system, bool(request.prefix), request.prompt]
            found.append(joined(text, request.prefix, spaced=self._special) if request.prefix else text)
        return found

    def _answer(self, row: list[int], tail: list[int], ended: bool, opened: bool, marks: dict[int, bool]) -> Answer:
        """The answer in a row of tokens; ``tail`` are tokens of the prefix, ``marks`` tell tokens that end a thought."""
        ends = [place for place, token in enumerate(row) if marks.get(token)]
        begun = opened or (bool(row) and marks.get(row[0]) is False)
        if ends or (begun and marks):
            split = ends[-1] + 1 if ends else len(row)
            thought, text = texts_of(self.loaded.tokenizer, [row[:split], row[split:]])
            thought = thought_and_answer(thought, True)[0] or ""
            return Answer(text.strip(), len(row) - split, ended, thought, split)
        if tail:
            before, whole = texts_of(self.loaded.tokenizer, [tail, [*tail, *row]])
            text = whole[len(before) :] if whole.startswith(before) else texts_of(self.loaded.tokenizer, [row])[0]
            return Answer(text.rstrip(), len(row), ended)
        text = texts_of(self.loaded.tokenizer, [row])[0]
        thought_text, answer = thought_and_answer(text, opened)
        if thought_text is None:
            return Answer(answer.strip(), len(row), ended)
        split = self._end_of_thought(row) if answer else len(row)
        return Answer(answer.strip(), len(row) - split, ended, thought_text, split)

    def _end_of_thought(self, row: list[int]) -> int:
        """How many tokens reach to the end of the thought, where its last tag is text of several tokens."""
        count = len(END_OF_THOUGHT.findall(texts_of(self.loaded.tokenizer, [row])[0]))
        low, high = 0, len(row)
        while low < high:
            middle = (low + high) // 2
            enough = len(END_OF_THOUGHT.findall(texts_of(self.loaded.tokenizer, [row[:middle]])[0])) >= count
            low, high = (low, middle) if enough else (middle + 1, high)
        return high


def _by_room(rows: Sequence[Sequence[int]], most: int, context: int) -> dict[int, list[int]]:
    """Indices of rows by how many tokens their answers may have: ``most``, or what the context leaves."""
    if longest := [len(row) for row in rows if len(row) >= context]:
        raise DataError(f"a prompt takes {max(longest)} tokens and the model's context is {context}: shorten it")
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(min(most, context - len(row)), []).append(index)
    if short := sum(len(group) for room, group in groups.items() if room < most):
        notice(
            f"{short} of {len(rows)} answers have room for fewer than {most} tokens: the model's context is {context}"
        )
    return groups


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
            ordered, tokens = probabilities.sort(1, descending=True)
            dropped = ordered.cumsum(1) - ordered >= sampling.top_p
            probabilities = probabilities.masked_fill(dropped.gather(1, tokens.argsort(1)), 0.0)
        sums = probabilities.cumsum(1)
        drawn = numbers[list(indices), step].to(sums.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=sums.shape[1] - 1).to(logits.device)

    return choose


def _answer_tokens(loaded: LoadedModel) -> tuple[list[int], list[int]]:
    """The tokens that begin a yes and those that begin a no, of all spellings."""
    found = []
    for spellings in (YES, NO):
        word = spellings[0].casefold()
        firsts = [ids[0] for ids in token_ids(loaded.tokenizer, spellings, False) if ids]
        texts = texts_of(loaded.tokenizer, [[token] for token in firsts])
        # a token that is a space alone, or unknown, begins anything
        begins = [(text := one.strip().casefold()) != "" and word.startswith(text) for one in texts]
        found.append({token for token, begin in zip(firsts, begins, strict=True) if begin})
    yes, no = found
    if not yes or not no:
        lacking = "yes" if not yes else "no"
        raise EngineError(f"the tokenizer has no token for {lacking!r}: this model cannot be asked for a yes or no")
    return sorted(yes), sorted(no)


def _thought_marks(tokenizer: Any) -> dict[int, bool]:
    """The added tokens that are tags of a thought; True says that a tag ends one."""
    marks = {}
    for token, added in tokenizer.added_tokens_decoder.items():
        if END_OF_THOUGHT.fullmatch(added.content):
            marks[token] = True
        elif opens_thought(added.content):
            marks[token] = False
    return marks
