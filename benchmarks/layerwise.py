"""What capture by layer saves in memory and costs in time, on random llamas that need not fit into memory.

    python benchmarks/layerwise.py --work DIR --sizes 1,3 --runs 3

Each capture is a process of its own. Its own memory (``RssAnon``, sampled) is what it cannot do without; the largest resident
set counts pages of mapped files too, which the system takes back when it needs them.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

from synthetic import make_checkpoint
from tabulate import tabulate
from timing import arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import ROWS, make_tokenizer

MODES = {"plain": [], "by layer": ["--by-layer"]}


def main() -> None:
    parser = arguments(__doc__, model=False, runs=3)
    parser.add_argument("--work", type=Path, required=True, help="where the random checkpoints are made, or found")
    parser.add_argument("--sizes", default="1,3", help="gigabytes of bfloat16 weights")
    parser.add_argument("--rows", type=int, default=8, help="pairs of the contrast data")
    parser.add_argument("--batch-tokens", type=int, default=256)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    data, background = given.work / "rows.jsonl", given.work / "background.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in (ROWS * given.rows)[: given.rows]))
    background.write_text(" ".join(row["negative"] for row in ROWS) * 2)
    found = []
    for size in map(float, given.sizes.split(",")):
        model = make_checkpoint(given.work, size)
        make_tokenizer().save_pretrained(model)
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        runs: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}
        for _ in range(given.runs):
            for mode, options in MODES.items():
                command = ["capture", str(model), "--data", str(data), "--background", str(background)]
                command += [
                    "--batch-tokens",
                    str(given.batch_tokens),
                    "-o",
                    str(given.work / "x.stats.safetensors"),
                    "--force",
                ]
                runs[mode].append(_measured([*command, *options]))
        ratio = statistics.median(slow[0] / fast[0] for fast, slow in zip(runs["plain"], runs["by layer"], strict=True))
        for mode, measured in runs.items():
            seconds, own, memory = (statistics.median(values) for values in zip(*measured, strict=True))
            found.append(
                {
                    "weights, GB": weights / 1e9,
                    "capture": mode,
                    "seconds": seconds,
                    "own memory, GB": own / 1e9,
                    "own / float32 weights": own / (2 * weights),
                    "resident, GB": memory / 1e9,
                    "time / plain": ratio if mode != "plain" else 1.0,
                    "runs": measured,
                }
            )
    shown = [{key: value for key, value in row.items() if key != "runs"} for row in found]
    print(json.dumps(found, indent=1) if given.json else tabulate(shown, headers="keys", floatfmt=".3g"))


def _measured(arguments: list[str]) -> tuple[float, float, float]:
    """Seconds, and the largest own memory and resident set in bytes, of one run of the command line."""
    started = time.perf_counter()
    child = os.posix_spawn(
        sys.executable, [sys.executable, "-m", "steer2edit", *arguments], os.environ, file_actions=_quiet()
    )
    own = 0
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{child}/status").read_text().splitlines()
            own = max(own, int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024)
        time.sleep(0.02)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, own, usage.ru_maxrss * 1024


def _quiet() -> list[tuple[int, int, str, int, int]]:
    return [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]


if __name__ == "__main__":
    main()
