"""How long emitting a checkpoint takes against ``cp -r`` of its folder, and how much memory emitting and planning take.

    python benchmarks/emit_speed.py --work DIR --size 4

Makes (or uses again) a random llama of ``--size`` GB under ``--work``, with a rank-1 edit on every residual writer. Both
write a new folder; what the last run wrote is removed, and everything written is synced, before each run. Each is timed
twice: until it returns, and until a sync after it has returned. Memory is the peak of a fresh process, imports included.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from synthetic import make_checkpoint, random_plan, random_statistics
from timing import arguments, drop_from_cache, ratio, report

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.targets import emit

# each runs in a process of its own, which prints its seconds; the parent asks the kernel for its memory
_STAGE = """
import sys, time, torch
torch.set_num_threads({threads})
from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.compiler import make_plan
from steer2edit.plan import EditPlan
from steer2edit.statistics import Statistics
from steer2edit.targets import emit
checkpoint = open_checkpoint({model!r})
spec = read_spec(checkpoint)
start = time.perf_counter()
{work}
print(time.perf_counter() - start)
"""
_WORK = {
    "imports only": "pass",
    "emit": "emit(EditPlan.load({plan!r}), checkpoint, spec, 'checkpoint', {out!r})",
    "plan (component)": "make_plan(checkpoint, spec, Statistics.load({stats!r}), method='component')",
    "plan (steering)": "make_plan(checkpoint, spec, Statistics.load({stats!r}))",
}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds until ``work`` returns, and until what it wrote is on the disk."""
    start = time.perf_counter()
    work()
    returned = time.perf_counter() - start
    os.sync()
    return returned, time.perf_counter() - start


def peak_memory(code: str) -> float:
    """Peak resident memory, in MB, of a fresh Python that runs ``code``."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a stage failed with exit code {process.returncode}")
    # kilobytes on Linux, bytes on macOS
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def command_seconds(command: Sequence[str], runs: int) -> float:
    """The median wall time of a command line, warm."""
    seconds = []
    for run in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if run:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = arguments(__doc__, model=False, runs=5)
    parser.add_argument("--size", type=float, default=4.0, help="GB of the checkpoint (default %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is read and written")
    parser.add_argument("--cold", action="store_true", help="drop the base from the page cache before each run")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = make_checkpoint(given.work, given.size)
    checkpoint = open_checkpoint(model)
    spec = read_spec(checkpoint)
    plan = random_plan(checkpoint, spec)
    plan_file, stats_file, out = (given.work / name for name in ("x.plan.safetensors", "x.stats.safetensors", "out"))
    plan.save(plan_file)
    random_statistics(checkpoint, spec).save(stats_file)
    edited = sum(checkpoint.tensors[edit.tensor].nbytes for edit in plan.edits)

    variants: dict[str, Callable[[], object]] = {
        "cp -r": lambda: subprocess.run(["cp", "-r", model, out], check=True),
        "emit": lambda: emit(plan, checkpoint, spec, "checkpoint", out),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for run in range(given.runs + 1):
        for name, work in variants.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if given.cold:
                drop_from_cache([model / shard for shard in checkpoint.shards])
            took = timed(work)
            if run:
                seconds[name].append(took)
    shutil.rmtree(out, ignore_errors=True)

    memory = {}
    for stage, work in _WORK.items():
        filled = work.format(plan=str(plan_file), stats=str(stats_file), out=str(out))
        memory[stage] = peak_memory(_STAGE.format(threads=given.threads, model=str(model), work=filled))
        shutil.rmtree(out, ignore_errors=True)
    starting = {
        "steer2edit --help": command_seconds(["steer2edit", "--help"], given.runs),
        "steer2edit show PLAN": command_seconds(["steer2edit", "show", str(plan_file)], given.runs),
    }

    rows: list[list[object]] = []
    for column, until in enumerate(("until it returns", "until synced")):
        copied, emitted = ([pair[column] for pair in seconds[name]] for name in ("cp -r", "emit"))
        rows.append([f"cp -r, {until}", statistics.median(copied), "s"])
        rows.append([f"emit, {until}", statistics.median(emitted), "s"])
        rows.append([f"emit / cp -r, {until}", ratio(emitted, copied), ""])
    rows += [[f"peak memory: {stage}", value, "MB"] for stage, value in memory.items()]
    rows += [[name, value, "s"] for name, value in starting.items()]
    size = sum((model / shard).stat().st_size for shard in checkpoint.shards)
    details = {
        "bytes": size,
        "edited_bytes": edited,
        "cold": given.cold,
        "threads": given.threads,
        "seconds": seconds,
    }
    if not given.json:
        cache = "dropped from" if given.cold else "in"
        print(f"{size / 1e9:.2f} GB, of which {edited / 1e9:.2f} GB are edited; the base was {cache} the page cache")
    report(["what", "median", "unit"], rows, details, given.json)


if __name__ == "__main__":
    main()
