"""Where the time of a compile goes, stage by stage, against the passes of the model that it takes.

    python benchmarks/compile_speed.py MODEL --behavior concise

One compile with its proof runs in this process, as the command line starts it, and its functions are watched. Seconds are of the
processor. Every pass of the model is noted with its shape. Afterwards some passes of each stage run again, bare: the same rows,
padding and cache, without hooks, and nothing is computed from them. A stage's *floor* is its tokens without padding at the rate
of its own bare passes, its steps of generation at that of its own bare steps (rows whose answer has ended do not count), and the
unembedding at each position where logits are read. ``--work`` keeps the base's own answers for a second run. ``--share`` takes
a part of the examples, the questions and the texts: times are in proportion, and what is measured of the edit is not worth much.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import arguments, report

from steer2edit import compiler
from steer2edit.artefact.request import CompileRequest
from steer2edit.capture import background
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, open_behavior
from steer2edit.data.everyday import everyday_prompts
from steer2edit.evaluation import assess
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.metrics import Choice, Neutral, Preference
from steer2edit.progress import bar
from steer2edit.runtime.cache import cache_parameter, returned_cache
from steer2edit.runtime.model import DTYPES, LoadedModel, Runtime
from steer2edit.strength import neutral_texts
from steer2edit.strength.kl import NeutralText

STAGES = (
    (compiler, "load_model", "load the model"),
    (background, "own_answers", "own answers, background"),
    (compiler, "capture_statistics", "capture"),
    (compiler, "make_plan", "plan"),
    (neutral_texts, "own_answers", "own answers, chat of the KL"),
    (compiler, "neutral_texts", "the base on neutral texts"),
    (compiler, "settle", "strength of the edit"),
    (compiler, "emit", "write"),
    (assess, "steering_at", "strengths of the baselines"),
    (assess, "random_directions", "strengths of the baselines"),
    (Neutral, "measure", "proof: KL"),
    (Preference, "measure", "proof: likelihoods"),
    (Choice, "measure", "proof: likelihoods"),
    (Answers, "measure", "proof: written answers"),
    (compiler, "write_pages", "pages"),
)
"""What is watched: a module or a class, a function of it, and the stage that its time counts for."""
REST = "the rest"
CACHED, UNEMBEDDED = "step", "unembedding"


@dataclass(frozen=True)
class Call:
    """One pass of the body, or one unembedding: its tokens with padding, and the ``useful`` ones."""

    kind: str
    tokens: int
    useful: int
    width: int = 1
    past: int = 0
    mask: torch.Tensor | None = None
    cached: bool = False


@dataclass
class Meter:
    """Seconds of each stage, without those of the stages inside it, and its passes."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    kl_passes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stages: list[str] = field(default_factory=lambda: [REST])
    loaded: LoadedModel | None = None
    _since: tuple[float, float] = (0.0, 0.0)

    def turn(self) -> None:
        """Count the time up to now for the stage that runs."""
        now = time.process_time(), time.perf_counter()
        self.seconds[self.stages[-1]] += now[0] - self._since[0]
        self.wall[self.stages[-1]] += now[1] - self._since[1]
        self._since = now

    @contextmanager
    def running(self) -> Iterator[None]:
        """The time that is measured."""
        self._since = time.process_time(), time.perf_counter()
        with ExitStack() as stack:
            for owner, name, stage in STAGES:
                stack.enter_context(_replaced(owner, name, partial(self._staged, stage)))
            stack.enter_context(_replaced(compiler, "load_model", self._hooked))
            stack.enter_context(_replaced(NeutralText, "windows", self._counted))
            yield
            self.turn()

    def _staged(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            self.turn()
            self.stages.append(stage)
            try:
                return function(*given, **named)
            finally:
                self.turn()
                self.stages.pop()

        return timed

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(text: NeutralText, *given: Any, **named: Any) -> Any:
            began = time.process_time()
            found = function(text, *given, **named)
            self.kl_passes[text.stage + (", a few rows" if named.get("glance") else "")].append(
                time.process_time() - began
            )
            return found

        return counted

    def _hooked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def load(*given: Any, **named: Any) -> LoadedModel:
            loaded: LoadedModel = function(*given, **named)
            self.loaded = loaded
            body, head = loaded.body(), loaded.model.get_output_embeddings()
            fillers = torch.tensor(sorted({loaded.padding, *loaded.end_tokens}))
            body.register_forward_pre_hook(partial(self._pass, fillers), with_kwargs=True)
            head.register_forward_pre_hook(self._unembedding)
            return loaded

        return load

    def _pass(self, fillers: torch.Tensor, body: Any, _given: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        if "forward" in vars(body):  # the unembedding alone: see LoadedModel.logits
            return
        cache = named.get(cache_parameter(body.forward) or "")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = named.get("attention_mask")
        mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        step = past > 0 and ids.shape[1] == 1
        real = ~torch.isin(ids, fillers) if step or mask is None else mask[:, -ids.shape[1] :]
        kind = CACHED if step else ("continued" if past else "whole")
        cached = bool(named.get("use_cache"))
        call = Call(kind, ids.numel(), int(real.sum()), ids.shape[1], past, mask, cached)
        self.calls[self.stages[-1]].append(call)

    def _unembedding(self, _head: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0][..., 0].numel()
        self.calls[self.stages[-1]].append(Call(UNEMBEDDED, rows, rows))


@contextmanager
def _replaced(owner: Any, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


class Bare:
    """Passes of a model without hooks, timed."""

    def __init__(self, loaded: LoadedModel, runs: int) -> None:
        self._loaded, self._runs = loaded, runs
        for module in (loaded.body(), loaded.model.get_output_embeddings()):
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()

    def seconds(self, call: Call) -> float:
        """Processor seconds of one pass of this shape; the median of some."""
        run = self._unembedding(call) if call.kind == UNEMBEDDED else self._pass(call)
        taken = []
        with torch.inference_mode():
            for _ in range(self._runs + 1):
                ready = run()
                began = time.process_time()
                ready()
                taken.append(time.process_time() - began)
        return statistics.median(taken[1:])

    def _unembedding(self, call: Call) -> Callable[[], Callable[[], object]]:
        weight = self._loaded.model.get_output_embeddings().weight
        states = torch.randn(call.tokens, weight.shape[1]).to(weight)
        return lambda: partial(self._loaded.logits, states)

    def _pass(self, call: Call) -> Callable[[], Callable[[], object]]:
        body, loaded = self._loaded.body(), self._loaded
        ids = torch.randint(loaded.vocabulary, (call.tokens // call.width, call.width))
        mask = call.mask if call.mask is None else call.mask.long()
        settings: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": call.cached}
        if not call.past:
            return lambda: partial(body, **settings)
        name = cache_parameter(body.forward) or ""

        def ready() -> Callable[[], object]:
            # each run lengthens its cache
            cache = returned_cache(body(input_ids=ids[:1, :1].repeat(1, call.past), use_cache=True))
            cache.batch_select_indices(torch.zeros(len(ids), dtype=torch.long))
            return partial(body, **settings, **{name: cache})

        return ready


def floor(bare: Bare, calls: Sequence[Call], samples: int) -> tuple[float, float]:
    """Seconds of bare passes of the same shapes, and of their useful tokens alone, from ``samples`` passes of each kind."""
    same = useful = 0.0
    for kind in sorted({call.kind for call in calls}):
        chosen = [call for call in calls if call.kind == kind]
        tried = (
            [chosen[int((i + 0.5) * len(chosen) / samples)] for i in range(samples)]
            if len(chosen) > samples
            else chosen
        )
        rate = sum(map(bare.seconds, tried)) / sum(call.tokens for call in tried)
        same += rate * sum(call.tokens for call in chosen)
        useful += rate * sum(call.useful for call in chosen)
    return same, useful


def main() -> None:
    """Print a row a stage, and the sum."""
    parser = arguments(__doc__, runs=1)
    parser.add_argument("--behavior", default="concise", choices=behavior_files())
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--kl-budget", type=float, help="as of the command (default: the command's)")
    parser.add_argument("--share", type=float, default=1.0, help="part of the data that is used (default: all)")
    parser.add_argument(
        "--samples", type=int, default=6, help="bare passes of each kind and stage (default %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder of the artefact and of the base's own answers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = open_behavior(options.behavior)
    if options.share != 1:
        _take(options.share)
    meter = Meter()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        os.environ["STEER2EDIT_CACHE"] = str(work / "cache")
        with meter.running():
            request = CompileRequest(
                options.model,
                work / "out",
                behavior=_part(Behavior.named(options.behavior), options.share),
                to=("lora",),
                kl_budget=options.kl_budget,
                runtime=Runtime(dtype=options.dtype),
                questions=file.read_questions(),
                told=file.positive,
                force=True,
            )
            compiled = compiler.compile(request, bar)
    assert meter.loaded is not None
    dtype = str(meter.loaded.model.dtype).removeprefix("torch.")
    print(f"compiled in {sum(meter.seconds.values()):.0f} s of the processor; now the bare passes", file=sys.stderr)
    bare = Bare(meter.loaded, options.runs)
    rows: list[list[object]] = []
    total = [0.0] * 7
    for stage, seconds in meter.seconds.items():
        calls = meter.calls[stage]
        passes = [call for call in calls if call.kind in ("whole", "continued")]
        steps = [call for call in calls if call.kind == CACHED]
        same, useful = floor(bare, calls, options.samples)
        counts = [
            sum(one.tokens for one in passes),
            sum(one.useful for one in passes),
            sum(one.useful for one in steps),
        ]
        numbers = [seconds, *map(float, counts), float(len(steps)), same, useful]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        rows.append(_row(stage, numbers))
    rows.append(_row("all", total))
    kl = {name: {"passes": len(taken), "seconds": sum(taken)} for name, taken in meter.kl_passes.items()}
    details = {
        "model": str(options.model),
        "behavior": options.behavior,
        "dtype": dtype,
        "threads": options.threads,
        "strength": compiled.plan.measured.strength,
        "wall_seconds": dict(meter.wall),
        "kl": kl,
    }
    heads = ["stage", "s", "tokens", "without padding", "written", "steps", "bare, s", "floor, s", "s / floor"]
    report(heads, rows, details, options.json)
    if not options.json:
        print(f"\n{dtype}, {sum(meter.wall.values()):.0f} s by the clock")
        for name, one in kl.items():
            print(f"{name}: {one['passes']} passes, {one['seconds']:.1f} s")


def _part(behavior: Behavior, share: float) -> Behavior:
    """The behaviour with its first pairs."""
    count = round(share * len(behavior.examples) / 2)
    return replace(behavior, examples=behavior.examples[: 2 * max(count, 2)])


def _take(share: float) -> None:
    """Let a compile read so much of its texts, and ask so many of its questions."""
    for module, name in (
        (background, "BACKGROUND_TOKENS"),
        (neutral_texts, "PROMPTS"),
        (neutral_texts, "MAX_TOKENS"),
        (assess, "PROOF"),
        (assess, "GENERAL"),
    ):
        setattr(module, name, max(4, round(share * getattr(module, name))))
    prompts = everyday_prompts("background")[:: max(1, round(1 / share))]
    # as its module calls it
    setattr(background, "everyday_prompts", lambda _use: prompts)  # noqa: B010


def _row(stage: str, numbers: Sequence[float]) -> list[object]:
    seconds, tokens, useful, written, steps, same, floor_seconds = numbers
    counts = [int(one) if one else None for one in (tokens, useful, written, steps)]
    known = floor_seconds > 0
    return [
        stage,
        round(seconds, 1),
        *counts,
        round(same, 1) if known else None,
        round(floor_seconds, 1) if known else None,
        seconds / floor_seconds if known else None,
    ]


if __name__ == "__main__":
    main()
