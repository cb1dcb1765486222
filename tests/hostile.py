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
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_reports

STUDY = "steer2edit.study.1"
SECONDS = 20  # of the processor's time
WAITING = 120  # by the clock, on a machine that does other things too
MEMORY = 3 << 30
NESTED: Any = None
for _ in range(300):
    NESTED = [NESTED]
# what a JSON value may be replaced by
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "../../escape",
    "/etc/passwd",
    "a/b",
    "\x00",
    "\x1b[2J\x07",
    "\ud800",
    "\u202e",
    "x" * 5000,
    "<script>alert(1)</script>",
    "{{ 1/0 }}",
    "---\nlicense: x\n---",
    "NaN",
    "1",
    [],
    {},
    [[]],
    [None],
    [-1],
    [2**40, 2**40],
    {"a": 1},
    {"": {}},
    NESTED,
    list(range(300)),
]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, renamed, doubled or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(nodes(value)))
        if not path:
            if rng.random() < 0.1:
                return rng.choice(VALUES)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], rng.random()
        if kind < 0.6:
            holder[key] = json.loads(json.dumps(rng.choice(VALUES)))
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            name = rng.choice([text for text in VALUES if isinstance(text, str)] + list(holder))
            holder[name] = holder.pop(key)
        else:
            holder.insert(rng.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
    return value


def dump(value: Any, rng: random.Random) -> bytes:
    """JSON bytes, sometimes with a key twice or with something behind the end."""
    raw = json.dumps(value).encode()
    kind = rng.random()
    if kind < 0.04 and raw.startswith(b'{"'):
        end = raw.find(b",")
        return raw if end < 0 else raw[:end] + b"," + raw[1:]
    if kind < 0.06:
        return raw + rng.choice((b" ", b"\x00", b"{}", b"\xff", b"]"))
    if kind < 0.08:
        return b"[" * 100_000
    return json.dumps(value).encode("utf-16") if kind < 0.09 else raw


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, cut, doubled or put in."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, at = rng.random(), rng.randrange(len(data) + 1)
        if kind < 0.4 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            del data[at : at + rng.choice((1, 4, 64, len(data)))]
        elif kind < 0.8:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data))))
    return bytes(data)


def mutate_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header, the JSON in its metadata, its numbers or its bytes changed."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(raw, rng)
    metadata = header.get("__metadata__") or {}
    if kind < 0.6 and metadata:
        name = rng.choice(list(metadata))
        with contextlib.suppress(ValueError):
            metadata[name] = dump(mutate_json(json.loads(metadata[name]), rng), rng).decode("utf-8", "replace")
    elif kind < 0.75:
        values = bytearray(body)
        for _ in range(rng.choice((1, 5))):
            at = rng.randrange(max(1, len(values) // 4)) * 4
            values[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38, -1.0, 0.0, 1e-45)))
        body = bytes(values[: len(body)])
    elif kind < 0.85:
        # a tensor of another shape that takes the same bytes, or two that change places
        names = [name for name in header if name != "__metadata__"]
        entry = header[rng.choice(names)]
        shape = entry["shape"]
        count = 1
        for n in shape:
            count *= n
        entry["shape"] = rng.choice((shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1], [1, count]))
    else:
        header = mutate_json(header, rng)
    head = dump(header, rng)
    return struct.pack("<Q", len(head)) + head + body


def mutate_text(raw: bytes, rng: random.Random) -> bytes:
    """A file of JSON, one value or one a line, or of anything else."""
    if rng.random() < 0.2:
        return mutate_bytes(raw, rng)
    try:
        return dump(mutate_json(json.loads(raw), rng), rng)
    except ValueError:
        lines = raw.split(b"\n")
        at = rng.randrange(len(lines))
        try:
            lines[at] = dump(mutate_json(json.loads(lines[at]), rng), rng)
        except ValueError:
            return mutate_bytes(raw, rng)
        return b"\n".join(lines)


def mutate_file(path: Path, rng: random.Random) -> None:
    """Change a file in place; now and then into something that is no file."""
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        special = rng.choice(("fifo", "folder", "loop", "device", "nothing", "absent"))
        if special == "fifo":
            os.mkfifo(path)
        elif special == "folder":
            path.mkdir()
        elif special != "absent":
            path.symlink_to({"loop": path.name, "device": "/dev/zero", "nothing": "nowhere"}[special])
        return
    raw = path.read_bytes()
    path.write_bytes((mutate_safetensors if path.suffix == ".safetensors" else mutate_text)(raw, rng))


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
