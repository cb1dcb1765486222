"""What each fault leaves behind: an artefact that is complete or not there, and a base with every byte.

    python benchmarks/faults.py --work DIR

Makes a random llama of half a gigabyte under ``--work``, emits a rank-1 edit of every writer, and lets one thing after the
other go wrong. After each fault the folder, the base and what the next run says are looked at. Full disks are real where
this may mount a small file system (``--tmpfs``, as root); read and write errors are injected into the process.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from synthetic import make_checkpoint, random_plan
from tabulate import tabulate

from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.checkpoint import open_checkpoint

_FAILING = """
import errno, os, sys
real = getattr(os, {call!r})
count = [0]
def failing(*args, **kwargs):
    count[0] += 1
    if count[0] > {after}:
        raise OSError(getattr(errno, {code!r}), os.strerror(getattr(errno, {code!r})))
    return real(*args, **kwargs)
setattr(os, {call!r}, failing)
from steer2edit.cli.app import main
main()
"""
_PLAIN = "from steer2edit.cli.app import main; main()"
_NO_FORESIGHT = (
    "import steer2edit.lowering.disk_use as f; f.DiskUse.fits = True; from steer2edit.cli.app import main; main()"
)


class Bench:
    """A base, a plan, a place for artefacts, and what a complete one looks like."""

    def __init__(self, work: Path, size: float) -> None:
        self.base = make_checkpoint(work, size, 0.2)
        self.plan, self.place = work / "faults.plan.safetensors", work / "faults"
        checkpoint = open_checkpoint(self.base)
        random_plan(checkpoint, read_spec(checkpoint), {MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT}).save(self.plan)
        self.clean()
        start = time.perf_counter()
        self.emit().wait()
        self.seconds = time.perf_counter() - start
        self.whole, self.untouched = digest(self.place / "out"), digest(self.base)
        self.rows: list[list[object]] = []

    def clean(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

    def emit(self, code: str = _PLAIN, place: Path | None = None, *more: str) -> subprocess.Popen[str]:
        out = (place or self.place) / "out"
        command = [sys.executable, "-c", code, "emit", self.plan, self.base, "--to", "checkpoint", "-o", out, *more]
        return subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def after(self, fault: str, runs: int, said: set[str], found: list[str], again: set[str]) -> None:
        visible = ", ".join(f"{name} {found.count(name)}" for name in dict.fromkeys(found))
        base = "unchanged" if digest(self.base) == self.untouched else "CHANGED"
        told = " / ".join(sorted(said)) or "-"
        self.rows.append([fault, runs, told, visible, base, " / ".join(sorted(again)) or "-"])
        print(self.rows[-1], file=sys.stderr)

    def state(self, place: Path | None = None) -> str:
        found = digest((place or self.place) / "out")
        return "nothing" if found is None else "complete" if found == self.whole else "BROKEN"

    def again(self) -> set[str]:
        """Run once more; what it says of what it found."""
        run = self.emit()
        _, errors = run.communicate()
        said = {
            line.split(" (")[0].split("-")[0] for line in errors.splitlines() if line.startswith(("removed", "put"))
        }
        assert run.returncode == 0, errors
        assert self.state() == "complete"
        assert [path.name for path in self.place.iterdir()] == ["out"], list(self.place.iterdir())
        return said


def digest(folder: Path) -> str | None:
    """SHA-256 of every name and byte; None where there is no folder."""
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as file:
                while data := file.read(1 << 24):
                    found.update(data)
    return found.hexdigest()


def message(errors: str) -> str:
    """The error's first line, without what differs from run to run."""
    line = next((line for line in errors.splitlines() if line.startswith("Error")), "")
    if "Traceback" in errors:
        return "TRACEBACK"
    return line.replace(str(Path.cwd()), "")[:150]


def killed(bench: Bench, runs: int, seed: int) -> None:
    found, again = [], set()
    generator = random.Random(seed)
    for _ in range(runs):
        bench.clean()
        run = bench.emit()
        time.sleep(generator.uniform(0.3, 1.0) * bench.seconds)
        run.send_signal(signal.SIGKILL)
        run.wait()
        found.append(bench.state())
        if found[-1] == "nothing":
            again |= bench.again()
    bench.after("kill -9 at a random moment", runs, set(), found, again)


def failing(bench: Bench, call: str, code: str, after: int, what: str) -> None:
    bench.clean()
    run = bench.emit(_FAILING.format(call=call, code=code, after=after))
    _, errors = run.communicate()
    assert run.returncode == 2, errors
    found = [bench.state()]
    bench.after(what, 1, {message(errors)}, found, bench.again())


def full(bench: Bench, mount: Path, code: str, what: str) -> None:
    size = sum(path.stat().st_size for path in bench.base.iterdir()) // 2
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
    try:
        run = bench.emit(code, mount)
        _, errors = run.communicate()
        found = [bench.state(mount)]
        left = [path.name for path in mount.iterdir()]
        bench.after(what, 1, {message(errors)}, found, {f"left behind: {len(left)} files"})
    finally:
        subprocess.run(["umount", mount], check=True)


def changing(bench: Bench, change: Callable[[Path], object], what: str) -> None:
    bench.clean()
    shard = bench.base / sorted(path.name for path in bench.base.glob("*.safetensors"))[-1]
    kept = bench.place.parent / "kept.safetensors"
    os.link(shard, kept)
    told = shard.stat()
    run = bench.emit()
    # its files appear once it has begun to read
    while not list(bench.place.glob(".out.partial-*/*/*.safetensors")) and run.poll() is None:
        time.sleep(0.01)
    change(shard)
    _, errors = run.communicate()
    found = [bench.state()]
    said = {message(errors)} if run.returncode else set()
    shard.unlink(missing_ok=True)
    kept.rename(shard)
    os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))
    bench.after(what, 1, said, found, bench.again() if found == ["nothing"] else set())


def replaced(shard: Path) -> None:
    copy = shard.with_suffix(".copy")
    shutil.copyfile(shard, copy)
    copy.replace(shard)


def rewritten(shard: Path) -> None:
    """Another file's bytes in a new file of the same name; the kept link still holds the old ones."""
    shard.unlink()
    shard.write_bytes(b"\0" * 1000)


def together(bench: Bench) -> None:
    bench.clean()
    runs = [bench.emit() for _ in range(3)]
    ends = [run.communicate() for run in runs]
    said = {message(errors).split(" (process")[0] for _, errors in ends if errors and "Error" in errors}
    codes = sorted(run.returncode for run in runs)
    bench.after(f"three runs into one folder (exit codes {codes})", 1, said, [bench.state()], set())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is read and written")
    parser.add_argument("--size", type=float, default=0.5, help="GB of the base (default %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed (default %(default)s)")
    parser.add_argument("--tmpfs", action="store_true", help="mount a small file system for the full disks (root)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bench = Bench(given.work, given.size)
    killed(bench, given.kills, given.seed)
    failing(bench, "preadv", "EIO", 3, "reading fails (EIO)")
    failing(bench, "copy_file_range", "EIO", 3, "copying fails (EIO)")
    failing(bench, "pwrite", "EIO", 3, "writing fails (EIO)")
    failing(bench, "pwrite", "ENOSPC", 3, "the disk is full while an edited tensor is written (ENOSPC)")
    failing(bench, "copy_file_range", "EDQUOT", 3, "the quota ends while bytes are copied (EDQUOT)")
    failing(bench, "fsync", "EIO", 2, "forcing to the disk fails (EIO)")
    failing(bench, "replace", "EIO", 1, "the last rename fails (EIO)")
    if given.tmpfs:
        full(bench, given.work / "mount", _PLAIN, "a disk with room for half of it")
        full(bench, given.work / "mount", _NO_FORESIGHT, "a disk that fills up on the way (a real one)")
    changing(bench, lambda shard: os.utime(shard), "a shard's time changes while it is read")
    changing(bench, replaced, "a shard is replaced by a copy of itself")
    changing(bench, rewritten, "a shard is replaced by another file")
    changing(bench, os.unlink, "a shard is removed")
    together(bench)
    shutil.rmtree(bench.place)
    headers = ["fault", "runs", "what the run said", "afterwards", "base", "the next run"]
    print(tabulate(bench.rows, headers=headers, tablefmt="github"))


if __name__ == "__main__":
    main()
