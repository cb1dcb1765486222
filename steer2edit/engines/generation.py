"""What a model says: batched generation, greedy or by a rule that chooses each next token.

transformers' own ``generate`` takes every step. It works on rows whose answers have ended until the last one ends, so it is
stopped now and then, and goes on from its cache with the rows that are left. What all prompts of a batch begin with, such as a
system message, is read once. A trial on the model, once, compares the two ways; where they differ (some caches cannot be
continued), all rows stay to the end and are read whole, and a notice says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from steer2edit.data.templates import templated
from steer2edit.data.tokens import common_prefix, token_ids
from steer2edit.engines.penalty import own_penalty, penalised
from steer2edit.errors import DataError, count_of, first_line
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import pad_left
from steer2edit.runtime.cache import cache_parameter, more_than_rounding, returned_cache
from steer2edit.runtime.model import LoadedModel

_PART = 8
"""The batch is made smaller when one of so many rows has ended: that costs about as much as one step."""
_HEAD = 8
"""A beginning that all prompts share is worth a pass of its own from so many tokens on."""
_TRIAL_TOKENS = 16
_TRIAL_STEPS = 2
_FROM_THE_START = ("min_new_tokens", "begin_suppress_tokens")
"""Settings of generation that count from where a call of ``generate`` begins."""
_NOT_CONTINUED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a family's own code may raise where its cache cannot go on with some of the rows."""
Choose = Callable[[Sequence[int], int, torch.Tensor], torch.Tensor]
"""The next token of each of some rows: from their indices, the number of the step, and their logits ``[rows, vocabulary]``."""
_dropping: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 256,
    add_special_tokens: bool | None = None,
    progress: Progress = silent,
) -> list[list[int]]:
    """Greedy continuations as token ids, without the end token, in the order of ``prompts``.

    ``prompts`` are rendered texts. Without ``add_special_tokens`` they get those of the tokenizer unless it has a chat template,
    which writes its own. Whatever hooks are on the model are in force. Prompt and answer together are no longer than the model's
    context. Raises DataError where a prompt alone is.
    """
    tokenizer = loaded.tokenizer
    special = not templated(tokenizer) if add_special_tokens is None else add_special_tokens
    rows = token_ids(tokenizer, prompts, special)
    loaded.check_tokens(rows)
    room = loaded.context - max(map(len, rows), default=0)
    if room < 1:
        raise DataError(
            f"a prompt takes {loaded.context - room} tokens and the model's context is {loaded.context}: shorten it"
        )
    if room < max_new_tokens:
        most = count_of(room, "token")
        notice(f"answers have at most {most} and not {max_new_tokens}: the model's context is {loaded.context}")
        max_new_tokens = room
    answers: dict[int, list[int]] = {}
    with progress("generate", total=len(rows)) as advance:
        for index, answer in answered_rows(loaded, rows, max_new_tokens, batch_size):
            answers[index] = answer
            advance(1)
    return [answers[index] for index in range(len(rows))]


def answered_rows(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    choose: Choose | None = None,
    penalty: float | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Index of each row of token ids and its answer, as answers end, without the end token.

    ``choose`` chooses each next token; None is greedy decoding. A repetition ``penalty`` comes before that; None is the model's
    own. A batch that does not fit into memory is made smaller, with a notice. The caller sees to it that rows and answers fit
    into the model's context.
    """
    pending = deque(sorted(range(len(rows)), key=lambda i: len(rows[i])))
    while pending:
        chosen = [pending.popleft() for _ in range(min(batch_size, len(pending)))]
        batch = [rows[i] for i in chosen]
        rule = None if choose is None else partial(_of_rows, choose, chosen)
        written = set()
        try:
            drops = len(batch) > 1 and _drops(loaded, batch)
            for place, answer in _answers(loaded, batch, max_new_tokens, drops, rule, penalty):
                written.add(chosen[place])
                yield chosen[place], answer
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_size = (len(batch) + 1) // 2
            notice(
                f"{len(batch)} answers at a time do not fit into the device's memory: {batch_size} at a time from here"
            )
            pending.extendleft(reversed([i for i in chosen if i not in written]))
            torch.cuda.empty_cache()


def _of_rows(
    choose: Choose, chosen: Sequence[int], places: Sequence[int], step: int, logits: torch.Tensor
) -> torch.Tensor:
    return choose([chosen[place] for place in places], step, logits)


def _answers(
    loaded: LoadedModel,
    batch: Sequence[Sequence[int]],
    max_new_tokens: int,
    drops: bool,
    choose: Choose | None,
    penalty: float | None,
) -> Iterator[tuple[int, list[int]]]:
    """Place in the batch and answer of each row, as rows end.

    With ``drops`` rows that ended are worked on no longer.
    """
    head = _shared(batch) if drops else 0
    ids, mask, cache = _begun(loaded, batch, head if head >= _HEAD else 0)
    width, ends = ids.shape[1], torch.tensor(sorted(loaded.end_tokens), device=loaded.device)
    places = list(range(len(batch)))
    if penalty is None:
        penalty = own_penalty(loaded)
    while True:
        left = max_new_tokens - (ids.shape[1] - width)
        stop = [_enough_ended(ends)] if drops else []
        rule = [] if penalty == 1 else [penalised(penalty, mask)]
        rule += [] if choose is None else [_chosen(choose, places, width)]
        # for these steps alone: between two parts the caller has the word
        with torch.inference_mode(), _contiguous(loaded.model):
            ids, cache = _run(loaded, ids, mask, left, cache, stop, rule)
        ended = torch.isin(ids[:, width:], ends).any(1)
        if not drops or ids.shape[1] - width >= max_new_tokens or bool(ended.all()):
            break
        yield from _cut(ids[ended][:, width:], [p for p, e in zip(places, ended.tolist(), strict=True) if e], ends)
        alive = (~ended).nonzero()[:, 0]
        with torch.inference_mode():
            cache.reorder_cache(alive)
            grown = mask.new_ones(len(alive), ids.shape[1] - mask.shape[1])
            ids, mask, places = ids[alive], torch.cat([mask[alive], grown], 1), [places[i] for i in alive.tolist()]
    yield from _cut(ids[:, width:], places, ends)


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; each row's last one is its own, to go on from."""
    return min(min(common_prefix(rows[0], row) for row in rows), min(map(len, rows)) - 1)


def _begun(loaded: LoadedModel, batch: Sequence[Sequence[int]], head: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Ids and mask ``[rows, width]`` of a batch, and the cache of its ``head``.

    The head is so many tokens that all rows begin with; they are read once. Rows are filled up behind the head, on the left of
    what is their own: so every row's next token is at the same place.
    """
    from transformers.cache_utils import DynamicLayer

    ids, mask = pad_left([row[head:] for row in batch], loaded.padding, loaded.device)
    if not head:
        return ids, mask, None
    first = torch.tensor([batch[0][:head]], device=loaded.device)
    with torch.inference_mode():
        cache = returned_cache(loaded.body()(input_ids=first, use_cache=True))
        if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):
            # what fills rows up would count in a window, and be read into a state
            return *pad_left(batch, loaded.padding, loaded.device), None
        cache.batch_select_indices(torch.zeros(len(batch), dtype=torch.long, device=loaded.device))
    ids = torch.cat([first.expand(len(batch), -1), ids], 1)
    return ids, torch.cat([mask.new_ones(len(batch), head), mask], 1), cache


def _run(
    loaded: LoadedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    max_new_tokens: int,
    cache: Any,
    stop: Sequence[Callable[..., torch.Tensor]],
    rule: Sequence[Callable[..., torch.Tensor]],
) -> tuple[torch.Tensor, Any]:
    """Rows grown by at most ``max_new_tokens`` or until ``stop`` says so, and their cache.

    ``cache`` is that of the rows so far. ``rule`` are processors of logits.
    """
    rules = {"logits_processor": _processors(rule)} if rule else {}
    out = _generate(loaded, ids, mask, cache, max_new_tokens=max_new_tokens, stopping_criteria=_criteria(stop), **rules)
    return out.sequences, returned_cache(out)


def _generate(loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any, **settings: Any) -> Any:
    name = None if cache is None else cache_parameter(loaded.model.forward)
    continued = {} if name is None else {name: cache}
    return loaded.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=loaded.padding,
        return_dict_in_generate=True,
        **continued,
        **settings,
    )


def _criteria(stop: Sequence[Callable[..., torch.Tensor]]) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList(stop)


def _processors(rules: Sequence[Callable[..., torch.Tensor]]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(rules)


def _chosen(choose: Choose, places: Sequence[int], width: int) -> Callable[..., torch.Tensor]:
    """A processor of logits after which the token that ``choose`` chose is the likeliest, for rows of ``width`` tokens."""

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        tokens = choose(places, ids.shape[1] - width, logits)
        return torch.full_like(logits, -torch.inf).scatter(1, tokens[:, None], 0.0)

    return processor


def _enough_ended(ends: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A stopping criterion: true of all rows as soon as one of ``_PART`` has ended."""
    ended: torch.Tensor | None = None

    def criterion(ids: torch.Tensor, _scores: Any, **_more: Any) -> torch.Tensor:
        nonlocal ended
        new = torch.isin(ids[:, -1], ends)
        ended = new if ended is None else ended | new
        enough = int(ended.sum()) * _PART >= len(ids)
        return torch.full((len(ids),), enough, dtype=torch.bool, device=ids.device)

    return criterion


def _cut(rows: torch.Tensor, places: Sequence[int], ends: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each row up to its first end token, with its place."""
    final = set(ends.tolist())
    for place, row in zip(places, rows.tolist(), strict=True):
        yield place, row[: next((at for at, token in enumerate(row) if token in final), len(row))]


def _drops(loaded: LoadedModel, batch: Sequence[Sequence[int]]) -> bool:
    """Whether the model goes on with some of a batch's rows, tried once.

    A notice says why not.
    """
    known = _dropping.get(loaded.model)
    if known is None:
        reason = _try(loaded, batch)
        known = _dropping[loaded.model] = reason is None
        if reason is not None:
            kind = type(loaded.model).__name__
            notice(
                f"{kind} works on answers that have ended until the last one of their batch ends, which takes longer: {reason}"
            )
    return known


def _try(loaded: LoadedModel, batch: Sequence[Sequence[int]]) -> str | None:
    """Read the beginning of three rows once, drop one after two steps, and compare with the plain way.

    That is three rows which are read whole, and stay. The reason where that does not work, or None where both agree.
    """
    config = loaded.model.generation_config
    if changed := [name for name in _FROM_THE_START if getattr(config, name, None)]:
        return f"its generation_config sets {', '.join(changed)}"
    if cache_parameter(loaded.model.forward) is None:
        return "its forward takes no cache"
    # of three lengths, the first of which has the least padding
    longest: Sequence[int] = max(batch, key=len)
    first = list(longest)[:_TRIAL_TOKENS]
    rows = [first, [*first[: len(first) // 2], first[-1]], first[: max(1, len(first) - 1)]]
    ids, mask = pad_left(rows, loaded.padding, loaded.device)
    settings = {"output_logits": True, "min_new_tokens": _TRIAL_STEPS}
    try:
        whole = _generate(
            loaded, ids, mask, None, **{**settings, "max_new_tokens": 2 * _TRIAL_STEPS, "min_new_tokens": 4}
        )
        ids, mask, cache = _begun(loaded, rows, _shared(rows))
        part = _generate(loaded, ids, mask, cache, **settings, max_new_tokens=_TRIAL_STEPS)
        cache = returned_cache(part)
        if cache is None:
            return "it returns no cache"
        if all(getattr(cache, "is_linear", None) or [False]):
            return "its cache holds states alone, which generate takes up only at the beginning"
        staying = torch.tensor([0, 2], device=loaded.device)
        cache.reorder_cache(staying)
        mask = torch.cat([mask, mask.new_ones(3, _TRIAL_STEPS)], 1)[staying]
        rest = _generate(loaded, part.sequences[staying], mask, cache, **settings, max_new_tokens=_TRIAL_STEPS)
    except _NOT_CONTINUED as error:
        return f"its cache cannot go on with some of the rows ({type(error).__name__}: {first_line(error)})"
    steps = [*(logits[staying] for logits in part.logits), *rest.logits]
    for mine, theirs in zip(steps, whole.logits, strict=True):
        a, b = mine.float().log_softmax(-1), theirs[staying].float().log_softmax(-1)
        difference = float((a - b).abs().nan_to_num().mean())
        if more_than_rounding(difference, loaded.model.dtype):
            return f"log-probabilities would differ by {difference:.2g} nats"
        if not torch.equal(mine.argmax(-1), theirs[staying].argmax(-1)):
            break  # a tie that rounding decides; from here on the texts differ
    return None


@contextmanager
def _contiguous(model: Any) -> Iterator[None]:
    """Within the block the unembedding reads states that lie one behind the other in memory.

    The last states of all rows are a view with gaps, and for such a view torch multiplies each row by a copy of the whole
    unembedding: gigabytes, and half the time of an answer, for a large vocabulary.
    """
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        yield
        return
    handle = unembedding.register_forward_pre_hook(
        lambda _module, inputs: tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs)
    )
    try:
        yield
    finally:
        handle.remove()
