"""Files as an adversary or a failing disk would have them: mutations of sound ones, and commands to feed them to.

``python benchmarks/fuzz.py`` runs these for as long as one likes; ``test_hostile.py`` runs a few of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_reports
from mutations import mutate_file

STUDY = "steer2edit.study.1"
SECONDS = 20  # of the processor's time
WAITING = 120  # by the clock, on a machine that does other things too
MEMORY = 3 << 30


@dataclass(frozen=True)
class Finding:
    """What went wrong with one input."""

    target: str
    seed: int
    what: str


class _Late(BaseException):
    """Raised by the clock; no handler of the program under test may take it for its own."""


def attack(target: str, seed: int, sound: Path, scratch: Path) -> Finding | None:
    """Mutate what ``target`` reads and run it. None where it did well: a result, or one message and exit code 2."""
    files, command = TARGETS[target]
    rng = random.Random(f"{target} {seed}")
    box = scratch / "box"
    shutil.rmtree(box, ignore_errors=True)
    shutil.copytree(sound, box, symlinks=True)
    for name in rng.sample(files, 1 if rng.random() < 0.8 else min(2, len(files))):
        mutate_file(box / name, rng)
    before = _tree(scratch)
    fault = run_limited([part.replace("BOX", str(box)) for part in command])
    escaped = sorted(
        name for name in _tree(scratch) ^ before if not name.startswith(("box/out", "box/.out", "box/partial"))
    )
    if fault is None and escaped:
        fault = f"it wrote {escaped[:3]}"
    return None if fault is None else Finding(target, seed, fault)


def run_limited(arguments: list[str], seconds: int = SECONDS) -> str | None:
    """Run the command line in this process, with limits; what is wrong with how it ended, or None."""
    from click.testing import CliRunner

    from steer2edit.cli.app import main

    def late(*_: object) -> None:
        raise _Late

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    # SIGALRM is the program's own
    previous = signal.signal(signal.SIGUSR1, late)
    waiting = threading.Timer(WAITING, os.kill, (os.getpid(), signal.SIGUSR1))
    profiled = signal.signal(signal.SIGPROF, late)
    waiting.start()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    started = time.monotonic()
    try:
        result = CliRunner().invoke(main, arguments)
    except _Late:
        return f"it had not ended after {time.monotonic() - started:.0f} s"
    finally:
        waiting.cancel()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGUSR1, previous)
        signal.signal(signal.SIGPROF, profiled)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/steer2edit/" in frame.filename] or where
        return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:160]}"
    if result.exit_code not in (0, 1, 2):
        return f"it ended with {result.exit_code}"
    if result.exit_code == 2 and not result.stderr.strip():
        return "it said nothing"
    if "\x1b" in result.stdout + result.stderr:
        return "it let an escape sequence through"
    return None


def _tree(folder: Path) -> set[str]:
    found = set()
    for parent, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(parent, name), folder) for name in (*folders, *files)}
    return found


def make_sound(folder: Path, make_model: Callable[[Path], Any], rows: list[dict[str, Any]]) -> Path:
    """A folder with everything the targets read, all of it sound: ``make_model`` saves a tiny model."""
    from click.testing import CliRunner

    from steer2edit.cli.app import main

    def run(*arguments: str) -> None:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, (arguments, result.output)

    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# A model\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    header = list(rows[0])
    cells = [header, *([json.dumps(row[key]) for key in header] for row in rows)]
    (folder / "rows.csv").write_text("".join(",".join(line) + "\n" for line in cells))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    model, stats, plan = (str(folder / name) for name in ("model", "x.stats.safetensors", "x.plan.safetensors"))
    run("capture", model, "--data", str(folder / "rows.jsonl"), "-o", stats)
    run("plan", model, "--stats", stats, "-o", plan, "--method", "component", "--top-heads", "4", "--top-neurons", "9")
    run("emit", plan, model, "--to", "checkpoint", "-o", str(folder / "made"))
    run("emit", plan, model, "--to", "lora", "-o", str(folder / "adapter"))
    (folder / "short.txt").write_text("the cat is red and the dog is old . " * 5)
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps({**row, "prompt": f"and {row['prompt']}"}) + "\n" for row in rows)
    )
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}Assistant :"
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    made_reports.make_evaluation(6).save(folder / "evaluation.json")
    study, (trials, given) = folder / "study", made_reports.make_trials(8)
    study.mkdir()
    (study / "study.json").write_text(json.dumps({"format": STUDY, "settings": given, "trials": trials}))
    shutil.copy(plan, study / "knee.plan.safetensors")
    shutil.copy(folder / "evaluation.json", study)
    (folder / "merged").mkdir()
    with contextlib.suppress(ImportError):
        import gguf  # noqa: F401

        run("emit", plan, model, "--to", "gguf", "-o", str(folder / "gguf"))
    return folder


_MODEL = ["model/config.json", "model/model.safetensors.index.json"]
_SHARD = "model/model-00001-of-00003.safetensors"
_MADE = ["made/steer2edit.json", "made/steer2edit/plan.safetensors", "made/model.safetensors.index.json"]
_CAPTURE = ["capture", "BOX/model", "-o", "BOX/out.stats.safetensors"]
_SHORT = ["--background", "BOX/short.txt"]
# what is mutated, and what reads it; BOX is the folder
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "checkpoint": (
        [*_MODEL, _SHARD],
        ["plan", "BOX/model", "--stats", "BOX/x.stats.safetensors", "-o", "BOX/out.plan.safetensors"],
    ),
    "emit": (
        [*_MODEL, _SHARD, "model/README.md", "model/tokenizer_config.json", "x.plan.safetensors"],
        ["emit", "BOX/x.plan.safetensors", "BOX/model", "--to", "checkpoint", "-o", "BOX/out"],
    ),
    "emit-lora": (
        ["x.plan.safetensors", "model/README.md"],
        ["emit", "BOX/x.plan.safetensors", "BOX/model", "--to", "lora", "-o", "BOX/out"],
    ),
    "statistics": (
        ["x.stats.safetensors"],
        ["plan", "BOX/model", "--stats", "BOX/x.stats.safetensors", "-o", "BOX/out.plan.safetensors"],
    ),
    "component": (
        ["x.stats.safetensors"],
        [
            *["plan", "BOX/model", "--stats", "BOX/x.stats.safetensors", "--method", "component"],
            *["--top-heads", "4", "--top-neurons", "9", "-o", "BOX/out.plan.safetensors"],
        ],
    ),
    "show": (["x.plan.safetensors"], ["show", "BOX/x.plan.safetensors"]),
    "show-json": (["x.plan.safetensors"], ["show", "BOX/x.plan.safetensors", "--json"]),
    "verify": (
        [*_MADE, "made/model-00001-of-00003.safetensors"],
        ["verify", "BOX/made", "--base", "BOX/model", "--level", "bytes"],
    ),
    "verify-lora": (
        ["adapter/steer2edit.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
        ["verify", "BOX/adapter", "--base", "BOX/model", "--level", "bytes"],
    ),
    "report": (
        [*_MADE[:2]],
        ["report", "BOX/made", "-o", "BOX/out.html"],
    ),
    "push": (["made/steer2edit.json"], ["push", "BOX/made", "user/name", "--dry-run"]),
    "push-plan": (["x.plan.safetensors"], ["push", "BOX/x.plan.safetensors", "user/name", "--dry-run"]),
    **{
        f"data-{kind}": ([f"rows.{kind}"], [*_CAPTURE, "--data", f"BOX/rows.{kind}", *_SHORT])
        for kind in ("jsonl", "json", "csv", "parquet")
    },
    "tokenizer": (
        ["model/tokenizer.json", "model/tokenizer_config.json", "model/config.json", "model/generation_config.json"],
        [*_CAPTURE, "--data", "BOX/rows.jsonl", *_SHORT],
    ),
    "evaluation": (
        ["evaluation.json"],
        ["report", "BOX/x.plan.safetensors", "--evaluation", "BOX/evaluation.json", "-o", "BOX/out.html"],
    ),
    "study": (
        ["study/study.json", "study/evaluation.json", "study/knee.plan.safetensors"],
        ["report", "BOX/study", "-o", "BOX/out.html"],
    ),
    "adapter": (
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
        ["import", "BOX/adapter", "--model", "BOX/model", "-o", "BOX/out.plan.safetensors"],
    ),
    "gguf": (
        ["gguf/adapter.gguf"],
        ["import", "BOX/gguf/adapter.gguf", "--model", "BOX/model", "-o", "BOX/out.plan.safetensors"],
    ),
    "diff": (
        [*_MADE, "made/model-00001-of-00003.safetensors", "model/config.json"],
        ["diff", "BOX/model", "BOX/made", "-o", "BOX/out.plan.safetensors"],
    ),
    "revert": (
        [*_MADE, "made/model-00001-of-00003.safetensors"],
        ["revert", "BOX/made", "--base", "BOX/model", "-o", "BOX/out"],
    ),
    "scale": (
        ["x.plan.safetensors"],
        ["scale", "BOX/x.plan.safetensors", "--by", "0.5", "-o", "BOX/out.plan.safetensors"],
    ),
    # runs the model: what a stranger's adapter, plan and questions do to an evaluation
    "eval": (
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "questions.jsonl", "x.plan.safetensors"],
        [
            *["eval", "BOX/model", "BOX/x.plan.safetensors", "BOX/adapter", "--eval", "BOX/questions.jsonl"],
            *["--neutral", "BOX/short.txt", "--max-new-tokens", "4", "--limit", "4"],
        ],
    ),
}
