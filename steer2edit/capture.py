"""Run the model over contrast data once and keep moments of every writer's input and output.

The span of an example is the positions that predict its response's tokens, ``[start-1, end-1)``. Memory does not
grow with the number of examples, and the unembedding is never computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import Site
from steer2edit.distributed import ALONE, World
from steer2edit.encoding import Encoded
from steer2edit.model import LoadedModel, batches, pad_right
from steer2edit.progress import Progress, silent
from steer2edit.resume import EVERY_SECONDS, Partial, identity
from steer2edit.statistics import Accumulator, Side, Statistics


def capture(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    *,
    batch_tokens: int = 4096,
    source: dict[str, Any] | None = None,
    world: World = ALONE,
    keep: Path | None = None,
    keep_every: float = EVERY_SECONDS,
    progress: Progress = silent,
) -> Statistics:
    """Moments at every writer, and of the residual stream after every block.

    ``batch_tokens`` bounds a batch with its padding; the result does not depend on it beyond float rounding.
    ``source`` is stored with the statistics (model fingerprint, data hash). The processes of a ``world`` share the batches,
    and each has the whole result. Sums are kept at ``keep`` every ``keep_every`` seconds, and a run that finds its own there
    goes on from them; the file is the caller's to remove once the result is safe.
    """
    pad = loaded.tokenizer.pad_token_id or 0
    lengths = [len(example.ids) for example in examples]
    everything = batches(lengths, batch_tokens)
    costs = [len(indices) * lengths[indices[0]] for indices in everything]
    plan = [everything[i] for i in world.share(costs)]
    accumulator, done, partial = Accumulator(), 0, None
    if keep is not None:
        ids = [(e.label, e.row, e.start, e.ids) for e in examples]
        described = {"source": source, "examples": ids, "batch_tokens": batch_tokens, "world": asdict(world)}
        partial = Partial(keep, identity(described), keep_every)
        accumulator, done = partial.load(len(plan))
    stage = f"capture, which goes on after {done} of {len(plan)} batches" if done else "capture"
    span = _Span(accumulator)

    def run() -> None:
        total = sum(lengths[i] for indices in plan for i in indices)
        with _capturing(loaded, span), progress(stage, total=total) as advance:
            advance(sum(lengths[i] for indices in plan[:done] for i in indices))
            for number, indices in enumerate(plan[done:], start=done + 1):
                chosen = [examples[i] for i in indices]
                ids, mask = pad_right([example.ids for example in chosen], pad, loaded.device)
                span.select(chosen, ids.shape[1])
                with torch.inference_mode():
                    loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
                if partial is not None:
                    partial.keep(accumulator, number)
                advance(sum(len(example.ids) for example in chosen))

    world.together(run)
    accumulator = Accumulator.of(world.total(accumulator.state()))
    return accumulator.result({"positions": "[start-1, end-1)", **(source or {})})


class _Span:
    """Which positions of the batch that is running count, and with what weight."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._accumulator = accumulator
        self._positions = torch.empty(0, dtype=torch.long)
        self._spread = torch.empty(0)

    def select(self, chosen: Sequence[Encoded], width: int) -> None:
        spans = [range(example.start - 1, len(example.ids) - 1) for example in chosen]
        self._accumulator.begin([(e.label, e.row, len(s)) for e, s in zip(chosen, spans, strict=True)])
        self._positions = torch.tensor([row * width + p for row, span in enumerate(spans) for p in span])
        self._spread = torch.block_diag(*(torch.full((1, len(span)), 1.0 / len(span)) for span in spans))  # type: ignore[no-untyped-call]

    def add(self, key: str, side: Side, activations: torch.Tensor, heads: int | None = None) -> None:
        device = activations.device
        if self._positions.device != device:
            self._positions, self._spread = self._positions.to(device), self._spread.to(device)
        # OPT's MLP runs on [rows * positions, features]
        values = activations.flatten(0, -2).index_select(0, self._positions)
        self._accumulator.add(key, side, values, self._spread, heads)


@contextmanager
def _capturing(loaded: LoadedModel, span: _Span) -> Iterator[None]:
    def writer(site: Site) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            span.add(site.key, "input", inputs[0], site.heads)
            span.add(site.key, "output", output)

        return hook

    def block(key: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            span.add(key, "output", output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:
        for site in loaded.spec.sites:
            stack.callback(loaded.module(site).register_forward_hook(writer(site)).remove)
        for layer in range(loaded.spec.layers):
            module = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.callback(module.register_forward_hook(block(f"residual.{layer}")).remove)
        yield
