"""How long emitting a checkpoint takes against ``cp -r`` of its folder, and how much memory emitting and planning take.

    python benchmarks/emit_speed.py --work DIR --size 4
    python benchmarks/emit_speed.py --work DIR --size 4 --sites attn        (those that the default method edits)

Makes (or uses again) a random llama of ``--size`` GB under ``--work``, with a rank-1 edit on its residual writers. Both
write a new folder; what the last run wrote is removed, and everything written is synced, before each run. Each is timed
until it returns, until a sync after it has returned, and by its processor time, which depends least on what else runs.
Memory is the peak of a fresh process, imports included.
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

from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.artefact.emit import emit
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.scoring.scores import Scoring

_ROLES = {"both": {MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT}, "attn": {MatrixRole.ATTN_OUT}}


def emit_again(model: str, plan: str, _stats: str, out: str) -> None:
    """Emit the plan, as a command would: everything is opened anew."""
    checkpoint = open_checkpoint(model)
    emit(EditPlan.load(plan), checkpoint, read_spec(checkpoint), "checkpoint", out)


def plan_again(method: str, model: str, stats: str) -> None:
    """Plan by a method, as a command would."""
    checkpoint = open_checkpoint(model)
    make_plan(Scoring(checkpoint, read_spec(checkpoint), Statistics.load(stats)), method=method)


# each runs in a process of its own, with the checkpoint, the plan, the statistics and the folder to write
STAGES: dict[str, Callable[[str, str, str, str], None]] = {
    "imports only": lambda *_: None,
    "emit": emit_again,
    "plan (component)": lambda model, _plan, stats, _out: plan_again("component", model, stats),
    "plan (steering)": lambda model, _plan, stats, _out: plan_again("steering", model, stats),
}


def timed(work: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds until ``work`` returns, until what it wrote is on the disk, and of processor time, children included."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    work()
    returned, processor = time.perf_counter() - start, sum(os.times()[:4]) - before
    os.sync()
    return returned, time.perf_counter() - start, processor


def peak_memory(stage: str, threads: int, *paths: Path) -> float:
    """Peak resident memory, in MB, of a fresh Python that runs a stage (Linux).

    From the process's own status: getrusage counts what the parent had when it forked.
    """
    code = f"import torch; torch.set_num_threads({threads}); import emit_speed\n"
    code += f"emit_speed.STAGES[{stage!r}](*{[str(path) for path in paths]!r})\n"
    code += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=where)
    return int(done.stdout.split()[-1]) * 1024 / 1e6


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
    parser.add_argument("--sites", choices=list(_ROLES), default="both", help="writers edited (default %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the base from the page cache before each run")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = make_checkpoint(given.work, given.size)
    checkpoint = open_checkpoint(model)
    spec = read_spec(checkpoint)
    plan = random_plan(checkpoint, spec, _ROLES[given.sites])
    plan_file, stats_file, out = (given.work / name for name in ("x.plan.safetensors", "x.stats.safetensors", "out"))
    plan.save(plan_file)
    random_statistics(checkpoint, spec).save(stats_file)
    edited = sum(checkpoint.tensors[edit.tensor].nbytes for edit in plan.edits)

    variants: dict[str, Callable[[], object]] = {
        "cp -r": lambda: subprocess.run(["cp", "-r", model, out], check=True),
        "emit": lambda: emit(plan, checkpoint, spec, "checkpoint", out),
    }
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
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
    for stage in STAGES:
        memory[stage] = peak_memory(stage, given.threads, model, plan_file, stats_file, out)
        shutil.rmtree(out, ignore_errors=True)
    starting = {
        "steer2edit --help": command_seconds(["steer2edit", "--help"], given.runs),
        "steer2edit show PLAN": command_seconds(["steer2edit", "show", str(plan_file)], given.runs),
    }

    rows: list[list[object]] = []
    for column, until in enumerate(("until it returns", "until synced", "processor time")):
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
