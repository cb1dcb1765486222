"""``capture``: in one process, in several, and going on where it was interrupted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.data_options import CaptureFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import JsonFlags, ModelFlags, ReplaceFlags, progress_bar
from steer2edit.cli.output import print_result
from steer2edit.errors import count_of
from steer2edit.options import option
from steer2edit.runtime.launch import process_of

if TYPE_CHECKING:
    from steer2edit.plan.measured import TextKind


@dataclass(frozen=True)
class BackgroundFlags(FlagGroup):
    """A capture without data."""

    heading: ClassVar[str] = "Data"

    background_only: bool = option(False, "Capture the background text alone, to plan with imported vectors.")


@dataclass(frozen=True)
class MomentsFlags(FlagGroup):
    """What is captured beside the usual."""

    heading: ClassVar[str] = "Data"

    stream_moments: tuple[int, ...] = option(
        (),
        "Keep the whole covariance of the stream after this layer, for ablation --eraser leace. Repeatable.",
        rare=True,
    )


@dataclass(frozen=True)
class LargeFlags(FlagGroup):
    """Models larger than memory, and several processes."""

    heading: ClassVar[str] = "Large models"

    by_layer: bool = option(
        False, "Hold one layer in memory at a time, for models larger than memory (needs accelerate)."
    )
    scratch: Path | None = option(None, "Folder for the hidden states of --by-layer.", shown_default="beside --out")
    tensor_parallel: bool = option(
        False, "Under torchrun, divide the model's matrices among the processes, not the data."
    )


@dataclass(frozen=True)
class StatisticsFlags(FlagGroup):
    """Where the statistics go."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Statistics file to write, *.stats.safetensors.", "-o", "--out")
    keep_every: float = option(
        60.0,
        "Seconds between two times that the sums so far are saved, to go on after an interruption.",
        minimum=0,
        rare=True,
    )


@command(
    data=CaptureFlags,
    background=BackgroundFlags,
    moments=MomentsFlags,
    model_flags=ModelFlags,
    large=LargeFlags,
    output=StatisticsFlags,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def capture(
    model: str,
    data: CaptureFlags,
    background: BackgroundFlags,
    moments: MomentsFlags,
    model_flags: ModelFlags,
    large: LargeFlags,
    output: StatisticsFlags,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Run MODEL over contrast data once and save the statistics.

    Under torchrun or accelerate launch the processes share the data. Sums are saved in OUT.partial while it runs; started
    again after an interruption, it goes on from there.
    """
    from contextlib import ExitStack
    from dataclasses import replace as replaced

    from steer2edit.capture.resume import partial_path
    from steer2edit.capture.run import capture_statistics
    from steer2edit.data.behavior import Behavior
    from steer2edit.data.templates import templated
    from steer2edit.errors import ArchitectureError
    from steer2edit.progress import silent
    from steer2edit.runtime.by_layer import opened_by_layer
    from steer2edit.runtime.distributed import ALONE, joined, own_device
    from steer2edit.runtime.model import load_model

    out, by_layer, tensor_parallel = output.out, large.by_layer, large.tensor_parallel
    if large.scratch is not None and not by_layer:
        raise click.UsageError("--scratch goes with --by-layer")
    if tensor_parallel and (by_layer or model_flags.device_map):
        raise click.UsageError("--tensor-parallel, --by-layer and --device-map each place the model; give one of them")
    if tensor_parallel and process_of(os.environ) is None:
        raise click.UsageError("--tensor-parallel is for several processes: torchrun … -m steer2edit capture …")
    if background.background_only and data.any:
        raise click.UsageError("--background-only stands in place of --data and --behavior")
    replace.check(out, "statistics")
    with joined(None if tensor_parallel else "gloo") as world, ExitStack() as stack:

        def ready() -> Any:
            checkpoint, spec = model_flags.open(model)
            # the data first: it is quickly known to be bad
            behavior = Behavior("background", ()) if background.background_only else data.read_behavior()
            text, keep = data.read_background(), data.read_keep()
            runtime = model_flags.runtime()
            runtime = replaced(runtime, device=own_device(runtime.device))
            if tensor_parallel:
                if spec.routers:
                    raise ArchitectureError("a mixture's experts are not seen one by one under --tensor-parallel")
                runtime = replaced(runtime, tensor_parallel=True)
            if by_layer:
                place = large.scratch if large.scratch is not None else out.absolute().parent
                layers = stack.enter_context(opened_by_layer(checkpoint, spec, runtime, place))
                return checkpoint, behavior, text, keep, layers.loaded, layers
            return checkpoint, behavior, text, keep, load_model(checkpoint, spec, runtime), None

        checkpoint, behavior, text, texts_to_keep, loaded, layers = world.together(ready)
        # with divided matrices every process has all the data, and they go in step: one alone cannot resume
        keep = None if tensor_parallel else partial_path(out, world.rank, world.size)
        statistics = capture_statistics(
            loaded,
            checkpoint,
            behavior,
            background=text,
            texts_to_keep=texts_to_keep,
            batch_tokens=data.batch_tokens,
            world=ALONE if tensor_parallel else world,
            keep=keep,
            keep_every=output.keep_every,
            layers=layers,
            stream_moments=moments.stream_moments,
            progress=progress_bar() if world.rank == 0 else silent,
        )
        world.together(lambda: statistics.save(out) if world.rank == 0 else None)
        if keep is not None:
            keep.unlink(missing_ok=True)
    if world.rank > 0:
        return
    result = {
        "statistics": str(out),
        "examples": {kind: count for kind, count in statistics.examples.items() if count or kind in _ALWAYS},
        "tokens": {
            kind: count for kind, count in statistics.tokens.items() if statistics.examples[kind] or kind in _ALWAYS
        },
        "processes": world.size,
    }
    # the KL of a later plan is measured on the model's own answers, if it can write any
    answers: TextKind = "chat" if templated(loaded.tokenizer) else "answers"
    kind = answers if statistics.examples["chat"] else "prose"
    print_result(result, printed.as_json, lambda result: _render(result, model, kind))


_ALWAYS = ("positive", "negative", "background")
"""Kinds of text that are counted even where there are none."""


_NAMES = {"chat": "own answers"}
"""Kinds of text by the names that a person reads, where they have others."""


def _render(result: dict[str, Any], model: str, kind: TextKind) -> str:
    import shlex

    from steer2edit.strength.settle import KL_BUDGETS

    counts = [
        f"{result['examples'][kind]} {_NAMES.get(kind, kind)} ({count_of(result['tokens'][kind], 'token')})"
        for kind in result["examples"]
    ]
    name, plan = result["statistics"], result["statistics"].removesuffix(".stats.safetensors") + ".plan.safetensors"
    budget = KL_BUDGETS[kind]
    command = f"steer2edit plan {shlex.quote(model)} --stats {shlex.quote(name)} --kl-budget {budget:g} -o {shlex.quote(plan)}"
    return "\n".join([f"Examples: {', '.join(counts)}.", "", f"Written: {name}", "", "Next:", f"  {command}"])
