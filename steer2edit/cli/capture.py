"""The command that captures: in one process, in several, and going on where it was interrupted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from steer2edit.cli.options import (
    PATH,
    data_options,
    json_option,
    model_options,
    open_model,
    print_result,
    progress_bar,
    read_background,
    read_behavior,
    read_runtime,
)
from steer2edit.runtime.launch import process_of


@click.command()
@click.argument("model")
@data_options
@click.option("-o", "--out", type=PATH, required=True, help="The statistics file, *.stats.safetensors.")
@click.option(
    "--keep-every",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds between two times that the sums are kept.",
)
@click.option(
    "--background-only", is_flag=True, help="No contrast data: what planning with imported vectors needs of a model."
)
@click.option(
    "--by-layer", is_flag=True, help="Hold one layer at a time, for models larger than memory (needs accelerate)."
)
@click.option("--scratch", type=PATH, help="Where --by-layer puts hidden states; beside OUT if left out.")
@click.option(
    "--tensor-parallel",
    is_flag=True,
    help="Under torchrun: divide the model's matrices among the processes, not the data.",
)
@model_options
@json_option
def capture(
    model: str,
    out: Path,
    keep_every: float,
    by_layer: bool,
    scratch: Path | None,
    background_only: bool,
    tensor_parallel: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Run MODEL over contrast data once and keep the statistics.

    Under torchrun or accelerate launch the processes share the data. Sums are kept in OUT.partial while it runs; started
    again after an interruption, it goes on from there.
    """
    from contextlib import ExitStack
    from dataclasses import replace

    from steer2edit.capture.resume import partial_path
    from steer2edit.capture.run import capture_statistics
    from steer2edit.data.behavior import Behavior
    from steer2edit.errors import ArchitectureError
    from steer2edit.progress import silent
    from steer2edit.runtime.by_layer import opened_by_layer
    from steer2edit.runtime.distributed import ALONE, joined, own_device
    from steer2edit.runtime.model import load_model

    if scratch is not None and not by_layer:
        raise click.UsageError("--scratch goes with --by-layer")
    if tensor_parallel and (by_layer or given["device_map"]):
        raise click.UsageError("--tensor-parallel, --by-layer and --device-map each place the model; give one of them")
    if tensor_parallel and process_of(os.environ) is None:
        raise click.UsageError("--tensor-parallel is for several processes: torchrun … -m steer2edit capture …")
    with joined(None if tensor_parallel else "gloo") as world, ExitStack() as stack:

        def ready() -> Any:
            checkpoint, spec = open_model(model, given)
            # the data first: it is quickly known to be bad
            if background_only and (given["data"] or given["behavior"]):
                raise click.UsageError("--background-only stands in place of --data and --behavior")
            behavior = Behavior("background", ()) if background_only else read_behavior(given)
            background = read_background(given)
            runtime = read_runtime(given)
            runtime = replace(runtime, device=own_device(runtime.device))
            if tensor_parallel:
                if spec.routers:
                    raise ArchitectureError("a mixture's experts are not seen one by one under --tensor-parallel")
                runtime = replace(runtime, tensor_parallel=True)
            if by_layer:
                place = scratch if scratch is not None else out.absolute().parent
                layers = stack.enter_context(opened_by_layer(checkpoint, spec, runtime, place))
                return checkpoint, behavior, background, layers.loaded, layers
            return checkpoint, behavior, background, load_model(checkpoint, spec, runtime), None

        checkpoint, behavior, background, loaded, layers = world.together(ready)
        # of divided matrices every process has all the data, and they go in step: one alone cannot resume
        keep = None if tensor_parallel else partial_path(out, world.rank, world.size)
        statistics = capture_statistics(
            loaded,
            checkpoint,
            behavior,
            background=background,
            batch_tokens=given["batch_tokens"],
            world=ALONE if tensor_parallel else world,
            keep=keep,
            keep_every=keep_every,
            layers=layers,
            progress=progress_bar() if world.rank == 0 else silent,
        )
        world.together(lambda: statistics.save(out) if world.rank == 0 else None)
        if keep is not None:
            keep.unlink(missing_ok=True)
    if world.rank > 0:
        return
    result = {
        "statistics": str(out),
        "examples": dict(statistics.examples),
        "tokens": dict(statistics.tokens),
        "processes": world.size,
    }
    print_result(
        result,
        as_json,
        lambda r: f"{r['statistics']}: {r['examples']} examples, {r['tokens']} response tokens",
    )
