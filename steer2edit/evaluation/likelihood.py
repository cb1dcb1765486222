"""How likely a model finds given responses: log-probabilities of their tokens, in batches that read a shared prompt once.

Responses to one prompt (the choices of a question, the two of a pair) continue one cache of it, and what all prompts begin
with is read once too. Only caches of attention can be continued so: where a model keeps anything else (recurrent or
convolutional states), or where a trial of both ways does not agree, each response is read with its prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from steer2edit.data.tokens import Encoded, common_prefix
from steer2edit.errors import first_line
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.cache import cache_parameter, more_than_rounding, returned_cache
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.unembedding import token_log_probabilities

_CHUNK = 256
_PASS = 64
"""What a pass costs beside its tokens, in tokens: it reads every weight, however little it does with them."""
_HEAD = 8
"""A beginning that all prompts share is worth a pass of its own from so many tokens on."""
_WORTH = 0.85
"""Sharing is taken up where it leaves at most this part of the tokens."""
_NOT_CONTINUED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a family's own code may raise where its cache cannot be continued by several responses."""
_continuing: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def response_log_probabilities(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    *,
    batch_tokens: int = 4096,
    share: bool = True,
    progress: Progress = silent,
) -> list[torch.Tensor]:
    """For each example the log-probabilities, in nats, of its response's tokens ``ids[start:]``; float64 ``[tokens]``.

    The unembedding runs on the positions that predict a response's tokens and on no others. Examples of one ``row`` share
    the tokens that they begin with, unless ``share`` is False; the values are the same but for rounding.
    """
    loaded.check_tokens(example.ids for example in examples)
    by_index: dict[int, torch.Tensor] = {}
    with progress("likelihood", total=len(examples)) as advance, torch.inference_mode():
        plan = _sharing(examples, batch_tokens) if share else None
        if plan is not None and _continues(loaded, examples, plan):
            passes = _shared(loaded, examples, plan)
        else:
            chosen = batches([len(example.ids) for example in examples], batch_tokens)
            passes = ((rows, _whole(loaded, [examples[i] for i in rows])) for rows in chosen)
        for rows, values in passes:
            by_index.update(zip(rows, values, strict=True))
            advance(len(rows))
    return [by_index[index] for index in range(len(examples))]


@dataclass(frozen=True)
class _Group:
    """Examples (their indices) that share their first ``prefix`` tokens, all of them before any token that is scored."""

    members: tuple[int, ...]
    prefix: int


@dataclass(frozen=True)
class _Sharing:
    """``head`` tokens that all examples begin with, and batches of groups that are read together."""

    head: int
    batches: tuple[tuple[_Group, ...], ...]

    def cost(self, examples: Sequence[Encoded]) -> int:
        """Tokens that are run, with what a pass costs beside them."""
        return self.head + sum(_cost(batch, examples, self.head) for batch in self.batches)


def _sharing(examples: Sequence[Encoded], batch_tokens: int) -> _Sharing | None:
    """How to share; None where it would save little."""
    rows: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        rows.setdefault(example.row, []).append(index)
    groups = [_Group(tuple(members), _prefix([examples[i] for i in members])) for members in rows.values()]
    head = _prefix(examples) if len(groups) > 1 else 0
    head = head if head >= _HEAD else 0
    if not groups or min(group.prefix for group in groups) < 1:
        return None
    made: list[list[_Group]] = []
    for group in sorted(groups, key=lambda group: -group.prefix):
        joined = [*made[-1], group] if made else []
        apart = (_cost(made[-1], examples, head) + _cost([group], examples, head)) if made else 0
        if joined and _cost(joined, examples, head) <= apart and _cached(joined, examples) <= batch_tokens:
            made[-1] = joined
        else:
            made.append([group])
    plan = _Sharing(head, tuple(map(tuple, made)))
    return plan if plan.cost(examples) <= _WORTH * sum(len(example.ids) for example in examples) else None


def _prefix(examples: Sequence[Encoded]) -> int:
    """How many tokens all of them begin with, up to the first position that predicts a response's token."""
    first, *others = examples
    shared = [common_prefix(first.ids, other.ids) for other in others]
    return min([*shared, *(example.start - 1 for example in examples)])


def _cost(batch: Sequence[_Group], examples: Sequence[Encoded], head: int) -> int:
    at = min(group.prefix for group in batch)
    rest = sum(len(examples[i].ids) - at for group in batch for i in group.members)
    return len(batch) * (at - head) + rest + 2 * _PASS


def _cached(batch: Sequence[_Group], examples: Sequence[Encoded]) -> int:
    """Tokens in the cache at once."""
    longest = max(len(examples[i].ids) for group in batch for i in group.members)
    return longest * sum(len(group.members) for group in batch)


def _shared(
    loaded: LoadedModel, examples: Sequence[Encoded], plan: _Sharing
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Pass by pass, indices and log-probabilities."""
    head = None
    if plan.head:
        _, head = _run(loaded, [examples[0].ids[: plan.head]], None, 0)
    for batch in plan.batches:
        # all prompts of a batch are cut where the shortest ends, so that no padding lies between a prompt and its responses
        at = min(group.prefix for group in batch)
        cache = None if head is None else _taken(head, [0] * len(batch))
        if at > plan.head:
            _, cache = _run(loaded, [examples[g.members[0]].ids[plan.head : at] for g in batch], cache, plan.head)
        owners = {index: place for place, group in enumerate(batch) for index in group.members}
        for rows in _parts({index: len(examples[index].ids) for index in owners}):
            taken = _taken(cache, [owners[index] for index in rows])
            states, _ = _run(loaded, [examples[i].ids[at:] for i in rows], taken, at)
            yield rows, _scored(loaded, states, [examples[i] for i in rows], at)


def _parts(lengths: dict[int, int]) -> Iterator[list[int]]:
    """Rows of like length, longest first: a part ends where its padding would cost more than a pass."""
    part: list[int] = []
    padding = 0
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        padding += lengths[part[0]] - lengths[index] if part else 0
        if padding > _PASS:
            yield part
            part, padding = [], 0
        part.append(index)
    yield part


def _run(loaded: LoadedModel, rows: Sequence[Sequence[int]], cache: Any, past: int) -> tuple[torch.Tensor, Any]:
    """Final states of ``rows``, which continue what ``cache`` holds, and the cache with them in it."""
    ids, mask = pad_right(rows, loaded.padding, loaded.device)
    mask = torch.cat([mask.new_ones(len(rows), past), mask], dim=1)
    body = loaded.body()
    name = cache_parameter(body.forward)
    past_cache = {} if cache is None or name is None else {name: cache}
    out = body(input_ids=ids, attention_mask=mask, use_cache=True, **past_cache)
    return out[0], returned_cache(out)


def _taken(cache: Any, rows: Sequence[int]) -> Any:
    """A cache of its own that holds these rows of ``cache``, which stays as it is."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    # both selecting and continuing put new tensors into a layer and change none in place
    taken.batch_select_indices(torch.tensor(rows))
    return taken


def _whole(loaded: LoadedModel, batch: Sequence[Encoded]) -> list[torch.Tensor]:
    """Log-probabilities of a batch whose examples are each read from their beginning."""
    ids, mask = pad_right([e.ids for e in batch], loaded.padding, loaded.device)
    return _scored(loaded, loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)[0], batch, 0)


def _scored(loaded: LoadedModel, states: torch.Tensor, batch: Sequence[Encoded], at: int) -> list[torch.Tensor]:
    """Of final states [rows, positions, hidden], the first of which is position ``at``."""
    pairs = list(zip(states, batch, strict=True))
    hidden = torch.cat([row[e.start - 1 - at : len(e.ids) - 1 - at] for row, e in pairs])
    gold = torch.tensor([token for e in batch for token in e.ids[e.start :]], device=hidden.device)
    parts = zip(torch.split(hidden, _CHUNK), torch.split(gold, _CHUNK), strict=True)
    values = torch.cat([token_log_probabilities(loaded.logits(h), g) for h, g in parts])
    return list(torch.split(values.double().cpu(), [len(e.ids) - e.start for e in batch]))


def _continues(loaded: LoadedModel, examples: Sequence[Encoded], plan: _Sharing) -> bool:
    """Whether the model's cache can be continued by several responses, tried once for each model; a notice says why not."""
    known = _continuing.get(loaded.model)
    if known is None:
        reason = _try(loaded, examples, plan)
        known = _continuing[loaded.model] = reason is None
        if reason is not None:
            kind = type(loaded.model).__name__
            notice(
                f"{kind} reads each response with its whole prompt, which takes longer than sharing prompts: {reason}"
            )
    return known


def _try(loaded: LoadedModel, examples: Sequence[Encoded], plan: _Sharing) -> str | None:
    """Share the prompts of one batch, and compare with reading them whole.

    The reason where that does not work, or None where both agree.
    """
    from transformers import cache_utils

    # a layer that uses an earlier one's keys and values has a cache that holds nothing, or none in older releases
    names = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
    known = {getattr(cache_utils, name, None) for name in names}

    if cache_parameter(loaded.body().forward) is None:
        return "its forward takes no cache"
    least = min(plan.batches, key=lambda batch: _cached(batch, examples))
    try:
        _, cache = _run(loaded, [examples[0].ids[:1]], None, 0)
        layers = getattr(cache, "layers", None)
        if not layers or any(type(layer) not in known for layer in layers):
            return "its cache is not of attention's keys and values alone"
        passes = list(_shared(loaded, examples, _Sharing(plan.head, (least,))))
    except _NOT_CONTINUED as error:
        return f"its cache cannot be continued ({type(error).__name__}: {first_line(error)})"
    # a module may keep a state of its own besides, which no type tells
    shared = torch.cat([values for _, part in passes for values in part])
    plain = torch.cat(_whole(loaded, [examples[i] for rows, _ in passes for i in rows]))
    difference = float((shared - plain).abs().mean())
    if not more_than_rounding(difference, loaded.model.dtype):
        return None
    return f"log-probabilities would differ by {difference:.2g} nats a token"
