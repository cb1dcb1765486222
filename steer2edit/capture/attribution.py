r"""Vectors from the model's gradients: what changes in the stream when the prompt's most telling tokens are masked.

GrAInS (arXiv 2507.18043). Of a pair with one prompt, the preference is ``f = log p(positive) − log p(negative)``. Integrated
gradients share ``f(prompt) − f(masked prompt)`` out among the prompt's tokens:

    attribution_i = (e_i − e') · mean over t of ∂f/∂e_i at e' + t (e − e')

with the embedding ``e'`` of a masked token, the mean of all embeddings.
(Zero, which is often taken, is a pole of the norms that follow.)
Then the k tokens of the largest attributions are masked, and the k of the smallest. What the stream loses after each block at
the prompt's last token, h − h_masked, is one difference for each pair; over the pairs its principal direction is taken
(``vector_kinds.principal``), and v = v_largest − v_smallest. The last token itself is not masked: the stream is read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.capture.pairs import MOST_PAIRS
from steer2edit.capture.vector_kinds import principal
from steer2edit.capture.vectors import Vectors
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded, common_prefix
from steer2edit.errors import DataError, count_of
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import pad_right
from steer2edit.runtime.model import LoadedModel

STEPS = 16
"""Points of the path from the masked prompt to the prompt at which gradients are taken."""
TOKENS = 3
"""How many of the prompt's tokens are masked at each end."""

_LOGITS = 1 << 26
"""How many logits are made at once, at most."""


@dataclass(frozen=True)
class Attribution:
    """The attributions of a prompt's first ``[tokens]``, float64, and the preference there and at the masked prompt."""

    tokens: torch.Tensor
    preference: float
    masked: float

    @property
    def gap(self) -> float:
        """What the attributions miss of the preference they share out, in nats; it falls with the number of steps."""
        return self.preference - self.masked - float(self.tokens.sum())


def by_gradients(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    *,
    name: str | None = None,
    steps: int = STEPS,
    tokens: int = TOKENS,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> Vectors:
    """A vector for the stream after each block, of at most ``MOST_PAIRS`` pairs. Raises DataError where there are under two."""
    pairs = _pairs(examples)
    if len(pairs) > MOST_PAIRS:
        notice(f"the gradients are those of {MOST_PAIRS} of the data's {len(pairs)} pairs")
        pairs = pairs[:: -(-len(pairs) // MOST_PAIRS)]
    pairs = [pair for pair in pairs if _shared(*pair) > tokens]
    if len(pairs) < 2:
        raise DataError(
            f"{count_of(len(pairs), 'pair shares', 'pairs share')} a prompt of more than {count_of(tokens, 'token')}; the vector "
            "of gradients takes two at least"
        )
    loaded.check_tokens(one.ids for pair in pairs for one in pair)
    losses: dict[str, list[torch.Tensor]] = {"largest": [], "smallest": []}
    gaps = []
    masked = masked_embedding(loaded)
    with progress("gradients", total=len(pairs)) as advance:
        for positive, negative in pairs:
            found = attribution(loaded, positive, negative, steps=steps, batch_tokens=batch_tokens, masked=masked)
            order = found.tokens[:-1].argsort(descending=True)
            prompt = positive.ids[: len(found.tokens)]
            ends = [[], order[:tokens].tolist(), order[-tokens:].tolist()]
            whole, largest, smallest = _states(loaded, prompt, ends, masked)
            losses["largest"].append(whole - largest)
            losses["smallest"].append(whole - smallest)
            gaps.append(abs(found.gap) / max(abs(found.preference - found.masked), 1e-9))
            advance(1)
    if (gap := sorted(gaps)[len(gaps) // 2]) > 0.1:
        notice(f"the attributions miss {gap:.0%} of the preference in the median pair; more --steps make it less")
    stacked = {end: torch.stack(one, dim=1).double() for end, one in losses.items()}  # [layers, pairs, hidden]
    ones = torch.ones(1, len(pairs), dtype=torch.float64)
    directions = {}
    for layer in range(loaded.spec.layers):
        v = [principal(D @ D.T, ones, ones)[0] @ D for D in (stacked["largest"][layer], stacked["smallest"][layer])]
        directions[f"residual.{layer}"] = (v[0] - v[1]).float()
    source = {
        "format": "steer2edit gradient vectors", "name": name, "fingerprint": loaded.fingerprint,
        "pairs": len(pairs), "steps": steps, "tokens": tokens,
    }  # fmt: skip
    return Vectors(directions, source={key: value for key, value in source.items() if value is not None})


def attribution(
    loaded: LoadedModel,
    positive: Encoded,
    negative: Encoded,
    *,
    steps: int = STEPS,
    batch_tokens: int = 4096,
    masked: torch.Tensor | None = None,
) -> Attribution:
    """Integrated gradients of the preference over the tokens that both examples begin with.

    ``masked`` [hidden] stands for a masked token; without it that is :func:`masked_embedding`.
    """
    length = _shared(positive, negative)
    masked = masked_embedding(loaded) if masked is None else masked
    prompt = torch.tensor([positive.ids[:length]], device=loaded.device)
    with torch.inference_mode():
        own = loaded.model.get_input_embeddings()(prompt)[0].float()
    own, masked = own.clone(), masked.expand(length, -1)
    # the middle of each step; the ends are for the sum that the attributions are to have
    points = [(step + 0.5) / steps for step in range(steps)]
    total = torch.zeros(length, dtype=torch.float64)
    ends = [0.0, 0.0]
    for one, sign in ((positive, 1.0), (negative, -1.0)):
        # logits of every position are made, and their gradients
        rows = max(1, min(batch_tokens, _LOGITS // loaded.vocabulary) // len(one.ids))
        for first in range(0, steps, rows):
            t = torch.tensor(points[first : first + rows], device=own.device)[:, None, None]
            paths = (masked + t * (own - masked)).requires_grad_(True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(_log_probability(loaded, one, paths).sum(), paths)
            along = (gradient.sum(dim=0).double() * (own - masked).double()).sum(dim=1)
            total += sign * along.cpu() / steps
        with torch.no_grad():
            for end, embedded in enumerate((masked, own)):
                ends[end] += sign * float(_log_probability(loaded, one, embedded[None]))
    return Attribution(total, ends[1], ends[0])


def masked_embedding(loaded: LoadedModel) -> torch.Tensor:
    """What stands for a masked token: the mean of all tokens' embeddings, as the model reads them, float32 ``[hidden]``."""
    module = loaded.model.get_input_embeddings()
    every = torch.arange(loaded.vocabulary, device=loaded.device)
    with torch.no_grad():
        sums = [module(part).float().sum(dim=0) for part in torch.split(every, 8192)]
    return torch.stack(sums).sum(dim=0) / loaded.vocabulary


def _log_probability(loaded: LoadedModel, one: Encoded, embedded: torch.Tensor) -> torch.Tensor:
    """Log-probability of the response in nats, ``[rows]``, where the first tokens have the embeddings [rows, tokens, hidden]."""
    ids = torch.tensor([one.ids] * len(embedded), device=loaded.device)
    with _embedded(loaded, embedded):
        logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    predicted = logits[:, one.start - 1 : len(one.ids) - 1].float().log_softmax(dim=-1)
    found: torch.Tensor = predicted.gather(2, ids[:, one.start :, None])[:, :, 0].sum(dim=1)
    return found


def _states(
    loaded: LoadedModel, prompt: Sequence[int], masks: Sequence[Sequence[int]], masked: torch.Tensor
) -> list[torch.Tensor]:
    """The stream after each block at the prompt's last token, ``[layers, hidden]`` float32, under each mask."""
    ids, mask = pad_right([prompt] * len(masks), loaded.padding, loaded.device)
    seen: dict[int, torch.Tensor] = {}

    def keeping(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[layer] = (output[0] if isinstance(output, tuple) else output)[:, -1].float().cpu()

        return hook

    with ExitStack() as stack, torch.no_grad():
        embedded = loaded.model.get_input_embeddings()(ids).float()
        for row, places in enumerate(masks):
            embedded[row, list(places)] = masked
        for layer in range(loaded.spec.layers):
            module = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.callback(module.register_forward_hook(keeping(layer)).remove)
        stack.enter_context(_embedded(loaded, embedded))
        loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
    states = torch.stack([seen[layer] for layer in range(loaded.spec.layers)], dim=1)
    return list(states)


@contextmanager
def _embedded(loaded: LoadedModel, embedded: torch.Tensor) -> Iterator[None]:
    """Within the block the first tokens of every row have the embeddings [rows, tokens, hidden]."""

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat((embedded.to(output.dtype), output[:, embedded.shape[1] :]), dim=1)

    handle = loaded.model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _pairs(examples: Sequence[Encoded]) -> list[tuple[Encoded, Encoded]]:
    """The first positive and the first negative example of each row that has both."""
    first: dict[tuple[str, int], Encoded] = {}
    for one in examples:
        first.setdefault((one.label, one.row), one)
    rows = dict.fromkeys(one.row for one in examples)
    positive, negative = LABELS
    return [
        (first[positive, row], first[negative, row])
        for row in rows
        if (positive, row) in first and (negative, row) in first
    ]


def _shared(positive: Encoded, negative: Encoded) -> int:
    """How many tokens of the prompt both begin with."""
    return min(common_prefix(positive.ids, negative.ids), positive.start, negative.start)
