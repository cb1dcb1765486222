"""Run the model over contrast data once and keep moments of every writer's input and output.

The span of an example is the positions that predict its response's tokens, ``[start-1, end-1)``; of an example that is
``last`` the outputs count at the last of them alone. Memory does not grow with the number of examples, and the unembedding is
never computed. Of a mixture's layers the routing is kept too: for each example how often, and with what weight, each expert was
chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import Site
from steer2edit.architecture.routers import Router
from steer2edit.capture import evidence
from steer2edit.capture.accumulator import Accumulator
from steer2edit.capture.background import answers_hash, chats, own_chat, prose
from steer2edit.capture.background import texts_to_keep as kept_examples
from steer2edit.capture.pairs import Pairs
from steer2edit.capture.populations import SCOPES, Scope, Side, routing_key
from steer2edit.capture.resume import EVERY_SECONDS, Partial, identity
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.stored import stored_name
from steer2edit.checkpoint import Checkpoint
from steer2edit.data import contrast
from steer2edit.data.behavior import Behavior
from steer2edit.data.neutral import NeutralChats, OwnNeutral
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.tokens import Encoded
from steer2edit.engines.chats import chat_answers
from steer2edit.engines.own_answers import OwnAnswer
from steer2edit.errors import PlanError
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.by_layer import Layers
from steer2edit.runtime.distributed import ALONE, World, whole
from steer2edit.runtime.expert_modules import Routed, combined, deciding, experts_module, visiting
from steer2edit.runtime.model import LoadedModel


def capture(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    *,
    batch_tokens: int = 4096,
    source: dict[str, Any] | None = None,
    world: World = ALONE,
    keep: Path | None = None,
    keep_every: float = EVERY_SECONDS,
    layers: Layers | None = None,
    stream_moments: Collection[int] = (),
    progress: Progress = silent,
) -> Statistics:
    """Moments at every writer, and of the residual stream after every block.

    After the blocks ``stream_moments`` the stream's whole second moment is kept, ``hidden²`` numbers for each source of text.
    ``batch_tokens`` bounds a batch with its padding; the result does not depend on it beyond float rounding.
    ``source`` is stored with the statistics (model fingerprint, data hash). The processes of a ``world`` share the batches,
    and each has the whole result. Sums are kept at ``keep`` every ``keep_every`` seconds, and a run that finds its own there
    goes on from them; the file is the caller's to remove once the result is safe. With ``layers`` the model runs one layer
    at a time, all batches through each, and nothing is kept on the way.
    """
    loaded.check_tokens(example.ids for example in examples)
    pad = loaded.padding
    lengths = [len(example.ids) for example in examples]
    everything = batches(lengths, batch_tokens)
    costs = [len(indices) * lengths[indices[0]] for indices in everything]
    plan = [everything[i] for i in world.share(costs)]
    pairs = Pairs.of((example.label, example.row) for example in examples)
    accumulator, done, kept = Accumulator(pairs), 0, None
    if keep is not None and layers is None:
        ids = [(stored_name(e.label), e.row, e.start, e.ids, e.last) for e in examples]
        described: dict[str, Any] = {
            "source": source,
            "examples": ids,
            "batch_tokens": batch_tokens,
            "world": asdict(world),
        }
        if stream_moments:
            described["stream_moments"] = sorted(stream_moments)
        kept = Partial(keep, identity(described), keep_every)
        accumulator, done = kept.load(len(plan), pairs)
    stage = f"capture, which goes on after {done} of {len(plan)} batches" if done else "capture"
    span = _Span(accumulator)

    def run() -> None:
        if layers is not None:
            with _capturing(loaded, span, stream_moments), layers.gated():
                _through_layers(layers, [[examples[i] for i in indices] for indices in plan], span, pad, progress)
            return
        total = sum(lengths[i] for indices in plan for i in indices)
        with _capturing(loaded, span, stream_moments), progress(stage, total=total) as advance:
            advance(sum(lengths[i] for indices in plan[:done] for i in indices))
            for number, indices in enumerate(plan[done:], start=done + 1):
                chosen = [examples[i] for i in indices]
                ids, mask = pad_right([example.ids for example in chosen], pad, loaded.device)
                span.select(chosen, ids.shape[1])
                with torch.inference_mode():
                    loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
                if kept is not None:
                    kept.keep(accumulator, number)
                advance(sum(len(example.ids) for example in chosen))

    world.together(run)
    accumulator = Accumulator.of(world.total(accumulator.state()), pairs)
    return accumulator.result({"positions": "[start-1, end-1)", **(source or {})})


def _through_layers(
    layers: Layers, plan: Sequence[Sequence[Encoded]], span: _Span, pad: int, progress: Progress
) -> None:
    tokens = [sum(len(example.ids) for example in chosen) for chosen in plan]
    with progress("capture by layer", total=sum(tokens) * len(layers)) as advance:
        for layer in range(len(layers)):
            with layers.resident(layer):
                for batch, chosen in enumerate(plan):
                    ids, mask = pad_right([example.ids for example in chosen], pad, layers.loaded.device)
                    span.select(chosen, ids.shape[1], again=layer > 0)
                    layers.run(batch, ids, mask)
                    advance(tokens[batch])


class _Span:
    """Which positions of the batch that is running count, and with what weight."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._accumulator = accumulator
        self._positions = torch.empty(0, dtype=torch.long)
        self._spread = self._spread_out = torch.empty(0)
        self._place = torch.empty(0, dtype=torch.long)
        self._scopes: dict[Scope, tuple[torch.Tensor, torch.Tensor]] = {}

    def select(self, chosen: Sequence[Encoded], width: int, again: bool = False) -> None:
        spans = [range(example.start - 1, len(example.ids) - 1) for example in chosen]
        self._accumulator.begin([(e.label, e.row, len(s)) for e, s in zip(chosen, spans, strict=True)], again)
        self._positions = torch.tensor([row * width + p for row, span in enumerate(spans) for p in span])
        self._spread = torch.block_diag(*(torch.full((1, len(span)), 1.0 / len(span)) for span in spans))  # type: ignore[no-untyped-call]
        # where the last position alone counts, that holds for what is written: inputs are those of the whole response
        self._spread_out = torch.block_diag(  # type: ignore[no-untyped-call]
            *(
                _last(len(s)) if e.last else torch.full((1, len(s)), 1.0 / len(s))
                for e, s in zip(chosen, spans, strict=True)
            )
        )
        self._place = torch.full((len(chosen) * width,), -1)
        self._place[self._positions] = torch.arange(len(self._positions))
        self._scopes = {scope: _counted(chosen, width, scope) for scope in SCOPES}

    def _follow(self, device: torch.device) -> None:
        if self._positions.device != device:
            self._positions, self._spread = self._positions.to(device), self._spread.to(device)
            self._spread_out = self._spread_out.to(device)
            self._place = self._place.to(device)

    def add(
        self, key: str, side: Side, activations: torch.Tensor, heads: int | None = None, width: int | None = None
    ) -> None:
        self._follow(activations.device)
        # OPT's MLP runs on [rows * positions, features]
        values = activations.flatten(0, -2).index_select(0, self._positions)
        if width is not None:
            values = whole(values, width)
        spread = self._spread if side == "input" else self._spread_out
        self._accumulator.add(key, side, values, spread, heads, paired=side == "output")

    def add_expert(self, router: Router, routed: Routed) -> None:
        self._follow(routed.inner.device)
        places = self._place[routed.tokens]
        kept = places >= 0
        self._accumulator.add_expert(
            router.layer,
            routed.expert,
            router.experts,
            routed.inner[kept],
            self._spread[:, places[kept]],
            routed.weights[kept],
        )

    def add_routing(self, router: Router, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        for scope, (counted, tokens) in self._scopes.items():
            counted = counted.to(chosen.device)
            per_example = [
                counted @ torch.zeros(len(chosen), router.experts, device=chosen.device).scatter_add_(1, chosen, each)
                for each in (torch.ones_like(weights, dtype=torch.float32), weights.float())
            ]
            lengths = tokens.to(chosen.device)[:, None]
            # each example is one draw: its tokens are not independent
            found = {
                "selected": per_example[0] / lengths,
                "mass": per_example[1] / lengths,
                "counts": torch.cat((per_example[0], lengths), dim=1),
            }
            whole = torch.eye(len(lengths), device=chosen.device)
            for what, values in found.items():
                self._accumulator.add(routing_key(what, scope, router.layer), "output", values, whole)


def _last(length: int) -> torch.Tensor:
    """Weights of a span's positions of which the last alone counts, [1, length]."""
    weights = torch.zeros(1, length)
    weights[0, -1] = 1
    return weights


def _counted(chosen: Sequence[Encoded], width: int, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of the flattened batch count for each example, [examples, rows · width], and how many do."""
    mask = torch.zeros(len(chosen), len(chosen), width)
    for row, example in enumerate(chosen):
        start, end = max(example.start - 1, 0), len(example.ids) - 1
        if scope == "response":
            span = slice(start, end)
        elif scope == "all" or start == 0:  # text without a prompt counts as a whole
            span = slice(0, end)
        else:
            span = slice(0, start)
        mask[row, row, span] = 1
    mask = mask.flatten(1)
    return mask, mask.sum(dim=1).clamp(min=1)


@contextmanager
def _capturing(loaded: LoadedModel, span: _Span, stream_moments: Collection[int]) -> Iterator[None]:
    def writer(site: Site) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            span.add(site.key, "input", inputs[0], site.heads, site.in_features)
            span.add(site.key, "output", output)

        return hook

    def block(layer: int) -> Any:
        blocks = 1 if layer in stream_moments else None

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            span.add(f"residual.{layer}", "output", output[0] if isinstance(output, tuple) else output, blocks)

        return hook

    def routed_sum(router: Router) -> Any:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            span.add(f"experts_out.{router.layer}", "output", combined(loaded.model, router, output))

        return hook

    with ExitStack() as stack:
        for router in loaded.spec.routers:
            stack.enter_context(visiting(loaded.model, router, partial(span.add_expert, router)))
            stack.enter_context(deciding(loaded.model, router, partial(span.add_routing, router)))
            module = experts_module(loaded.model, router)
            stack.callback(module.register_forward_hook(routed_sum(router)).remove)
        for site in (site for site in loaded.spec.sites if site.expert is None):
            stack.callback(loaded.module(site).register_forward_hook(writer(site)).remove)
        for layer in range(loaded.spec.layers):
            module = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.callback(module.register_forward_hook(block(layer)).remove)
        yield


def capture_statistics(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    behavior: Behavior,
    *,
    background: OwnNeutral | None = None,
    chat: Sequence[OwnAnswer] | None = None,
    texts_to_keep: OwnNeutral | None = None,
    batch_tokens: int = 4096,
    world: World = ALONE,
    keep: Path | None = None,
    keep_every: float = EVERY_SECONDS,
    layers: Layers | None = None,
    stream_moments: Collection[int] = (),
    progress: Progress = silent,
) -> Statistics:
    """Run the model over the behaviour's examples and the background once; the result remembers of what it is.

    The background stands for everything else the model may read and write. It has two formats: running text, the packaged
    English one where ``background`` is none; and answers under the model's template, its own to the packaged prompts where
    neither ``chat`` nor ``background`` are any. Answers are generated first. Without examples the background is captured alone,
    for vectors from elsewhere. On ``texts_to_keep`` the edit is to have no push.
    ``world``, ``keep``, ``keep_every``, ``layers`` and ``stream_moments`` are those of :func:`capture.capture`. Raises PlanError
    for moments of layers that are not there.
    """
    if strange := [layer for layer in stream_moments if not 0 <= layer < loaded.spec.layers]:
        raise PlanError(
            f"--stream-moments {strange[0]} is not in this model, which has the layers 0-{loaded.spec.layers - 1}"
        )
    arguments = behavior.chat_template_kwargs
    if isinstance(background, NeutralChats):
        given, background = background, None
        chat = world.together(
            lambda: chat_answers(loaded, given, "--background", chat_template_kwargs=arguments, progress=progress)
        )
    texts = contrast.background_text() if background is None else background
    texts = [texts] if isinstance(texts, str) else list(texts)
    if chat is None:
        chat = own_chat(loaded, loaded.fingerprint, world, arguments, progress)
    keeping = texts_to_keep
    kept = [] if keeping is None else world.together(lambda: kept_examples(loaded, keeping, arguments, progress))
    source = {
        "name": behavior.name,
        "data": contrast.data_hash(behavior.examples),
        "system": behavior.system,
        "span": behavior.span,
        **({"chat_template_kwargs": dict(arguments)} if arguments else {}),
        "background": hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest(),
        "chat": answers_hash(chat) if chat else None,
        **({"keep": answers_hash(kept)} if kept else {}),
        **({"origin": [dict(one) for one in behavior.origin]} if behavior.origin else {}),
        **({"metric": behavior.metric.described()} if behavior.metric is not None else {}),
        "prompts": sorted({prompt_digest(example.prompt) for example in behavior.examples}),
        **({"distinct_prompts": evidence.distinct_prompts(behavior.examples)} if behavior.examples else {}),
        "fingerprint": checkpoint.fingerprint,
        "model": checkpoint.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }

    def encoded() -> list[Encoded]:
        found = behavior.encode(loaded.tokenizer, loaded.context)
        if found:
            found = evidence.checked(behavior.examples, found)
        return found + prose(loaded, texts, "background") + chats(chat, "chat") + kept

    examples = world.together(encoded)
    return capture(
        loaded,
        examples,
        batch_tokens=batch_tokens,
        source=source,
        world=world,
        keep=keep,
        keep_every=keep_every,
        layers=layers,
        stream_moments=stream_moments,
        progress=progress,
    )
