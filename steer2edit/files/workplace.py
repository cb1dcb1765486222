"""Hidden folders in which a run prepares its output, and what killed runs left of them.

A workplace is a folder ``.NAME.partial-XXXXXXXX`` beside the output NAME (``.NAME.old-XXXXXXXX`` for a folder that is being
replaced). It holds a marker file, which names this program and the process, and the content. A folder without the marker is
not ours, whatever its name is, and is never touched.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

PROGRAM = "steer2edit"
MARKER = "steer2edit-process.json"
CONTENT = "content"
_MARKER_BYTES = 1000
Kind = Literal["partial", "old"]
log = logging.getLogger("steer2edit")


def process_mark() -> bytes:
    """What a lock file and a marker hold: this program, the process and the host, as JSON."""
    return json.dumps({"program": PROGRAM, "pid": os.getpid(), "host": socket.gethostname()}).encode()


def is_process_mark(raw: bytes) -> bool:
    """Whether these bytes were written by :func:`process_mark`."""
    try:
        mark = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(mark, dict) and {"program", "pid", "host"} == mark.keys() and mark["program"] == PROGRAM


def make_workplace(path: Path, kind: Kind = "partial") -> Path:
    """A new workplace beside ``path``, marked as ours on the disk. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{kind}-", dir=path.parent))
    try:
        (folder / MARKER).write_bytes(process_mark())
        sync_file(folder / MARKER)
        sync_folder(folder)
    except OSError:
        with suppress(OSError):
            remove_workplace(folder)
        raise
    return folder


def remove_workplace(folder: Path) -> None:
    """Remove a workplace, and its marker last. So a run that is killed here leaves a folder that is known as ours."""
    content = folder / CONTENT
    if content.is_dir() and not content.is_symlink():
        shutil.rmtree(content)
    else:
        content.unlink(missing_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def settle_leftovers(path: Path) -> list[str]:
    """Remove the workplaces that killed runs left beside ``path``; put back a folder that one of them had set aside.

    The caller holds the lock of ``path``. Each deed is logged, and returned. Raises OSError.
    """
    deeds = []
    for old in _workplaces(path, "old"):
        # killed between two renames: the old folder is whole, the new one may not be
        if (old / CONTENT).exists() and not path.exists():
            (old / CONTENT).replace(path)
            remove_workplace(old)
            deeds.append(f"put {path} back, which a killed run had set aside")
        else:
            remove_workplace(old)
            deeds.append(f"removed {old.name}, an artefact that had been replaced")
    for partial in _workplaces(path, "partial"):
        size = _size(partial)
        remove_workplace(partial)
        deeds.append(f"removed {partial.name} ({size / 1e6:.1f} MB), left unfinished by a killed run")
    for deed in deeds:
        log.warning("%s", deed)
    return deeds


def sync_file(path: Path) -> None:
    """Force a file to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force a folder's names to the disk, where the system can. Raises OSError where writing fails."""
    if os.name == "posix":
        sync_file(path)


def sync_tree(folder: Path) -> None:
    """Force every file and folder in ``folder`` to the disk, and itself. Raises OSError."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(root) / name)
        sync_folder(Path(root))


def _workplaces(path: Path, kind: Kind) -> list[Path]:
    # the random part has no dot, so that the workplace of a path called "x.partial-1" is not taken for one of "x"
    pattern = re.compile(re.escape(f".{path.name}.{kind}-") + r"[^.]*")
    return sorted(one for one in path.parent.iterdir() if pattern.fullmatch(one.name) and _is_ours(one))


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds our marker and at most the content beside it, or nothing at all."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        return False
    try:
        names = {one.name for one in folder.iterdir()}
    except OSError:
        return False
    if not names or not names <= {MARKER, CONTENT}:
        # an empty folder is a run's that was killed before it wrote the marker, and nothing is lost with it
        return not names
    mark = folder / MARKER
    if MARKER not in names or not stat.S_ISREG(mark.lstat().st_mode) or mark.lstat().st_size > _MARKER_BYTES:
        return False
    raw = mark.read_bytes()
    return is_process_mark(raw) or (not raw and names == {MARKER})


def _size(folder: Path) -> int:
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names if name != MARKER]
    return sum(file.lstat().st_size for file in files)
