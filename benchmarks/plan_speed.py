"""How long planning takes, against only reading the bytes of the matrices that it reads.

    python benchmarks/plan_speed.py MODEL
    python benchmarks/plan_speed.py --synthetic 4 --work DIR        (a random llama of 4 GB)

Statistics are random numbers of the model's shapes: planning does not depend on what they are. ``read`` is os.preadv of
the same byte ranges into one reused buffer, from the page cache; ``read + float32`` also converts them, which every plan
has to. With ``--cold`` the checkpoint's files are dropped from the page cache before each run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from synthetic import make_checkpoint, random_statistics
from timing import arguments, drop_from_cache, interleaved, ratio, report

from steer2edit.architecture import MatrixRole, Site, read_spec
from steer2edit.checkpoint import DTYPES, Checkpoint, open_checkpoint
from steer2edit.methods import make_plan
from steer2edit.scoring.scores import Scoring

METHODS = {"steering": {MatrixRole.ATTN_OUT}, "component": set(MatrixRole), "ablation": set(MatrixRole)}
_BLOCK_BYTES = 1 << 20


def read_only(checkpoint: Checkpoint, sites: Iterable[Site], convert: bool = False) -> None:
    """Read the sites' bytes into one buffer that is used again, and convert each block to float32 if asked to."""
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    wide = torch.empty(_BLOCK_BYTES)
    for site in sites:
        info = checkpoint.tensors[site.tensor]
        with open(checkpoint.path / info.shard, "rb", buffering=0) as file:
            for offset in range(0, info.nbytes, _BLOCK_BYTES):
                count = min(_BLOCK_BYTES, info.nbytes - offset)
                os.preadv(file.fileno(), [view[:count]], info.offset + offset)
                if convert:
                    block = torch.frombuffer(view[:count], dtype=DTYPES[info.dtype])
                    wide[: block.numel()].copy_(block)


def main() -> None:
    parser = arguments(__doc__, model=False)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("--synthetic", type=float, metavar="GB", help="make a random checkpoint of this size instead")
    parser.add_argument("--work", type=Path, default=Path("."), help="folder of the random checkpoint")
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    if (given.model is None) == (given.synthetic is None):
        parser.error("give either a model or --synthetic")
    torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model or make_checkpoint(given.work, given.synthetic))
    spec = read_spec(checkpoint)
    random = random_statistics(checkpoint, spec)
    shards = [checkpoint.path / shard for shard in checkpoint.shards]

    rows, details = [], {}
    for method in given.method or METHODS:
        sites = [site for site in spec.sites if site.role in METHODS[method]]
        variants: dict[str, Callable[[], object]] = {
            "read": lambda sites=sites: read_only(checkpoint, sites),  # type: ignore[misc]
            "read + float32": lambda sites=sites: read_only(checkpoint, sites, convert=True),  # type: ignore[misc]
            "plan": lambda method=method: make_plan(Scoring(checkpoint, spec, random), method=method),  # type: ignore[misc]
        }
        before = (lambda: drop_from_cache(shards)) if given.cold else None
        # warm, nothing waits for the disk: processor time is what an idle machine would take, with one thread
        clock = time.perf_counter if given.cold or given.threads > 1 else time.process_time
        seconds = interleaved(variants, given.runs, before, clock)
        size = sum(checkpoint.tensors[site.tensor].nbytes for site in sites)
        rows.append(
            [
                method,
                size / 1e6,
                *(1e3 * statistics.median(seconds[name]) for name in variants),
                ratio(seconds["plan"], seconds["read"]),
                ratio(seconds["plan"], seconds["read + float32"]),
            ]
        )
        details[method] = seconds
    headers = ["method", "MB", "read ms", "read + float32 ms", "plan ms", "plan / read", "plan / (read + float32)"]
    report(headers, rows, {"model": checkpoint.name, "threads": given.threads, "seconds": details}, given.json)


if __name__ == "__main__":
    main()
