"""Time and memory of masking experts of a large mixture, against ``cp -r``.

Each way of masking is timed; the experts are fused.

    python benchmarks/experts_mask.py --work DIR --size 8

Makes (or uses again) a random gpt_oss of ``--size`` GB under ``--work``, with 128 experts a layer in one tensor, and masks
``--experts`` of them, spread over its layers: by the router's bias, by output matrices of zeros, and (as many of every layer as
come nearest from below) by cutting them out.
No model is run. Each variant runs in a process of its own, one after the other in each round; seconds are those of the work
alone, peak memory that of the whole process, imports included. Everything is on the disk when a variant ends. Before each the
base is dropped from the page cache. What is written is removed; ``--remove`` removes the base too.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path

from streaming import COPY, run
from synthetic import make_gpt_oss
from timing import arguments, drop_from_cache, ratio, report

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint

_MASK = """
from steer2edit.experts.edits import Request, lower_experts
checkpoint = open_checkpoint(model)
spec = read_spec(checkpoint)
made = lower_experts(checkpoint, spec, Request.of({experts}), how={how!r})
emit(made, checkpoint, spec, 'checkpoint', out)
"""


def main() -> None:
    parser = arguments(__doc__, model=False, runs=3)
    parser.add_argument("--size", type=float, default=8.0, help="GB of the checkpoint (default %(default)s)")
    parser.add_argument("--experts", type=int, default=10, help="how many are masked (default %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is read and written")
    parser.add_argument("--remove", action="store_true", help="remove the base afterwards")
    given = parser.parse_args()
    model, out = make_gpt_oss(given.work, given.size), given.work / "experts-out"
    checkpoint = open_checkpoint(model)
    layers = [router.layer for router in read_spec(checkpoint).routers]
    experts = [(layers[i % len(layers)], 7 + 11 * (i // len(layers))) for i in range(given.experts)]
    # cutting wants as many of every layer
    cut = [(layer, 7 + 11 * i) for layer in layers for i in range(max(1, given.experts // len(layers)))]
    chosen = {"bias": experts, "zero": experts, "prune": cut}
    variants = {"cp -r": COPY, **{way: _MASK.format(experts=off, how=way) for way, off in chosen.items()}}
    files = [model / shard for shard in checkpoint.shards]
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in variants}
    for number in range(given.runs):
        for name, code in variants.items():
            shutil.rmtree(out, ignore_errors=True)
            drop_from_cache(files)
            runs[name].append(run(code, model, out, given.work / "no.plan", given.threads))
            took, peak = runs[name][-1]
            print(f"round {number}: {name} {took:.1f} s, {peak / 1e6:.0f} MB", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    size = sum(path.stat().st_size for path in files)
    if given.remove:
        shutil.rmtree(model)
    seconds = {name: [took for took, _ in taken] for name, taken in runs.items()}
    rows: list[list[object]] = [
        [
            name,
            statistics.median(seconds[name]),
            ratio(seconds[name], seconds["cp -r"]),
            max(peak for _, peak in taken) / 1e6,
        ]
        for name, taken in runs.items()
    ]
    if not given.json:
        counted = f"{given.experts} (cut: {len(cut)}) of {128 * len(layers)} experts in {size / 1e9:.2f} GB"
        print(f"{counted}; medians of {given.runs} rounds")
    details = {"bytes": size, "experts": experts, "runs": runs}
    report(["masked by", "seconds", "/ cp -r", "peak MB"], rows, details, given.json)


if __name__ == "__main__":
    main()
