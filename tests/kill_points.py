"""Emits a plan again and again in child processes, each of which kills itself before another system call.

    python tests/kill_points.py BASE PLAN FOLDER EVERY [force]

Prints a JSON line for each child: at which call it died, and what the folder and the base were afterwards. Run by
test_faults.py in a process of its own, so that forking meets no threads of the test runner.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.lowering import Writing
from steer2edit.plan import EditPlan

_CALLS = (
    "open",
    "pwrite",
    "preadv",
    "copy_file_range",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "link",
)


def digest(folder: Path) -> str | None:
    """SHA-256 of every name and byte in a folder; None where there is none."""
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b"/"))
    return found.hexdigest()


def die_before_call(number: int) -> None:
    """Let this process kill itself before its ``number``-th call of the file system."""
    left = [number]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)


def main() -> None:
    base, plan_file, work, every = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    force = "force" in sys.argv[5:]
    torch.set_num_threads(1)
    logging.disable()
    plan = EditPlan.load(plan_file)

    def run(out: Path, strength: float = 1.0, replacing: bool = False) -> None:
        checkpoint = open_checkpoint(base)
        writing = Writing(jobs=1, link=True)
        emit(
            plan.scaled(strength),
            checkpoint,
            read_spec(checkpoint),
            "checkpoint",
            out,
            force=replacing,
            writing=writing,
        )

    def before() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if force:
            run(work / "out", 0.5)

    before()
    old = digest(work / "out")
    run(work / "out", replacing=force)
    new, untouched = digest(work / "out"), digest(base)
    for number in range(0, 100_000, every):
        before()
        child = os.fork()
        if not child:
            die_before_call(number)
            run(work / "out", replacing=force)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        visible = digest(work / "out")
        hidden = sorted(path.name.split("-")[0] for path in work.iterdir() if path.name != "out")
        if force or visible is None:
            run(work / "out", replacing=force)
        after = {
            "call": number,
            "killed": os.WIFSIGNALED(status),
            "visible": {old: "old", None: "nothing", new: "new"}.get(visible, "broken"),
            "hidden": hidden,
            "again": digest(work / "out") == new,
            "left": sorted(path.name for path in work.iterdir()),
            "base": digest(base) == untouched,
        }
        print(json.dumps(after), flush=True)
        if not after["killed"]:
            break


if __name__ == "__main__":
    main()
