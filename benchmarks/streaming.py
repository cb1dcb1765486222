"""Time and memory of planning and emitting, by the size of a checkpoint.

They are compared with reading the same bytes and with ``cp -r``.

    python benchmarks/streaming.py --work DIR --size 1 --size 3.5 --size 7 --size 14 --shard 4
    python benchmarks/streaming.py --work DIR --size 14 --shard 4 --mixture         (128 fused experts a layer)

Makes (or uses again) random checkpoints under ``--work``, with a rank-1 edit on every residual writer. Each variant runs in
a process of its own, one after the other in each round; seconds are those of the work alone, peak memory that of the whole
process, imports included. Everything is on the disk when a variant ends: emit forces its files there itself, ``cp -r`` is
followed by an fsync of each file. Before each variant the base is dropped from the page cache. What is written is removed.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from synthetic import make_checkpoint, make_mixture, random_plan
from timing import arguments, drop_from_cache, ratio, report

from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.checkpoint import open_checkpoint

_START = """
import sys, time, torch
torch.set_num_threads({threads})
from pathlib import Path
from steer2edit.scoring.scores import analyse
from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.plan import EditPlan
from steer2edit.artefact.emit import emit
from steer2edit.lowering import Writing
model, out, plan = Path({model!r}), Path({out!r}), {plan!r}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(seconds, int(peak) * 1024)
"""
_READ = """
import os
buffer = memoryview(bytearray(8 << 20))
for path in sorted(model.glob('*.safetensors')):
    with open(path, 'rb', buffering=0) as file:
        while file.readinto(buffer):
            pass
"""
COPY = """
import os, subprocess
subprocess.run(['cp', '-r', model, out], check=True)
for path in out.iterdir():
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
"""
# what every method asks of the weights: each writer's products with a direction, in one reading
_PLAN = """
checkpoint = open_checkpoint(model)
for site in read_spec(checkpoint).sites:
    analyse(checkpoint, site, torch.ones(1, site.out_features), torch.ones(1, site.in_features))
"""
_EMIT = """
checkpoint = open_checkpoint(model)
emit(EditPlan.load(plan), checkpoint, read_spec(checkpoint), {to!r}, out, writing=Writing(jobs={jobs}))
"""


def run(work: str, model: Path, out: Path, plan: Path, threads: int) -> tuple[float, int]:
    """Seconds and peak bytes of some work in a new process."""
    code = _START.format(model=str(model), out=str(out), plan=str(plan), threads=threads, work=work)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak)


def measure(size: float, given: object, work: Path) -> tuple[list[list[object]], dict[str, object]]:
    """Rows of the table for one size, and every run."""
    make = make_mixture if given.mixture else make_checkpoint  # type: ignore[attr-defined]
    model = make(work, size, given.shard)  # type: ignore[attr-defined]
    checkpoint = open_checkpoint(model)
    spec = read_spec(checkpoint)
    plan_file, out = work / "streaming.plan.safetensors", work / "streaming-out"
    plan = random_plan(checkpoint, spec, {MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT})
    plan.save(plan_file)
    jobs = given.jobs  # type: ignore[attr-defined]
    variants = {
        "read": _READ,
        "cp -r": COPY,
        "plan": _PLAN,
        "emit checkpoint": _EMIT.format(to="checkpoint", jobs=jobs),
        "emit lora": _EMIT.format(to="lora", jobs=jobs),
    }
    if given.mixture:  # type: ignore[attr-defined]
        del variants["emit lora"]  # peft has no layers for experts in one tensor
    files = [model / shard for shard in checkpoint.shards]
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in variants}
    for number in range(given.runs + given.warm):  # type: ignore[attr-defined]
        for name, code in variants.items():
            shutil.rmtree(out, ignore_errors=True)
            drop_from_cache(files)
            took = run(code, model, out, plan_file, given.threads)  # type: ignore[attr-defined]
            if number >= given.warm:  # type: ignore[attr-defined]
                runs[name].append(took)
            print(f"{size:g} GB, round {number}: {name} {took[0]:.1f} s, {took[1] / 1e6:.0f} MB", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    total = sum(path.stat().st_size for path in files)
    edited = sum(spec.owners[edit.tensor].locate(checkpoint).nbytes for edit in plan.edits)
    seconds = {name: [took for took, _ in taken] for name, taken in runs.items()}
    rows: list[list[object]] = []
    for name, taken in runs.items():
        middle = statistics.median(seconds[name])
        rows.append(
            [
                total / 1e9,
                name,
                middle,
                total / middle / 1e6,
                max(peak for _, peak in taken) / 1e6,
                ratio(seconds[name], seconds["read"]),
                ratio(seconds[name], seconds["cp -r"]),
            ]
        )
    return rows, {"bytes": total, "edited": edited, "edits": len(plan.edits), "runs": runs}


def main() -> None:
    parser = arguments(__doc__, model=False, runs=5)
    parser.add_argument(
        "--size", type=float, action="append", required=True, help="GB of a checkpoint; may be repeated"
    )
    parser.add_argument("--shard", type=float, default=4.0, help="GB of a shard (default %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is read and written")
    parser.add_argument("--mixture", action="store_true", help="a mixture with 128 fused experts a layer")
    parser.add_argument("--jobs", type=int, default=None, help="pieces written at a time")
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted (default %(default)s)")
    given = parser.parse_args()
    rows, details = [], {}
    for size in given.size:
        found, told = measure(size, given, given.work)
        rows += found
        details[f"{size:g}"] = told
    headers = ["GB", "what", "seconds", "MB/s", "peak MB", "/ read", "/ cp -r"]
    report(headers, rows, {"threads": given.threads, "processors": os.cpu_count(), "sizes": details}, given.json)


if __name__ == "__main__":
    main()
