"""Feed the command line mutated files for as long as one likes, and print what it did not survive.

python benchmarks/fuzz.py --seconds 600                     every target in turn
python benchmarks/fuzz.py --target show --seed 17           one input again, with its traceback
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import ROWS, llama_config, save_tiny
from hostile import TARGETS, attack, make_sound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=[*TARGETS], action="append")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="this input only")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    targets = given.target or [*TARGETS]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sound = make_sound(
            folder / "sound",
            lambda path: save_tiny(path, llama_config(), max_shard_size="60KB"),
            ROWS,
        )
        (folder / "runs").mkdir()
        counts: Counter[str] = Counter()
        seen: dict[str, str] = {}
        seed, started = given.first, time.monotonic()
        while time.monotonic() - started < given.seconds:
            for target in targets:
                finding = attack(target, seed if given.seed is None else given.seed, sound, folder / "runs")
                counts[target] += 1
                if finding is not None and finding.what not in seen:
                    seen[finding.what] = f"{target} --seed {finding.seed}"
                    print(f"{target} --seed {finding.seed}: {finding.what}", flush=True)
            if given.seed is not None:
                break
            seed += 1
        spent = time.monotonic() - started
        print(f"{sum(counts.values())} inputs in {spent:.0f} s, {len(seen)} kinds of fault: {dict(counts)}")


if __name__ == "__main__":
    main()
