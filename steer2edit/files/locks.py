"""Surviving whatever happens between two system calls: locks, forced writes, and what a killed run left behind.

A path is written beside its place, forced to the disk, and renamed. While that goes on a lock file beside it is held by the
operating system, which lets go of it when the process dies: whoever gets the lock knows that anything unfinished there
belongs to nobody.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from steer2edit.errors import TargetError

try:
    import fcntl
except ImportError:  # no such locks on this system: two runs into one path are not told apart
    fcntl = None  # type: ignore[assignment]

# what this run has claimed, so that its own writing does not wait for itself
_claims: ContextVar[frozenset[Path]] = ContextVar("claims", default=frozenset())
log = logging.getLogger("steer2edit")


@contextmanager
def exclusive(path: Path, wait: bool = False) -> Iterator[None]:
    """Within the block no other run writes ``path``; what dead runs left of it is put right first.

    Raises TargetError where another run has it, unless ``wait`` is set.
    """
    if _key(path) in _claims.get():
        settle_leftovers(path)
        yield
        return
    lock = path.parent / f".{path.name}.lock"
    descriptor = _acquire(lock, path, wait)
    try:
        settle_leftovers(path)
        yield
    finally:
        if descriptor is not None:
            # removed while it is still held: a waiter sees that the name is gone, or another's, and starts again
            with suppress(FileNotFoundError):
                lock.unlink()
            os.close(descriptor)


@contextmanager
def claimed(paths: Iterable[Path]) -> Iterator[None]:
    """Within the block only what runs in it can write ``paths``: for work that takes long before it writes.

    Raises TargetError where another run has one of them.
    """
    with ExitStack() as stack:
        wanted = [path.expanduser() for path in paths]
        for path in wanted:
            stack.enter_context(_made(path.parent))
            try:
                stack.enter_context(exclusive(path))
            except OSError as error:
                raise TargetError(f"cannot write {path}: {error.strerror or error}") from None
        token = _claims.set(_claims.get() | {_key(path) for path in wanted})
        try:
            yield
        finally:
            _claims.reset(token)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder exists within the block; what had to be made of it goes again if it is still empty."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def _key(path: Path) -> Path:
    return path.parent.resolve() / path.name


def settle_leftovers(path: Path) -> list[str]:
    """Remove what killed runs left beside ``path``, and put back a folder that one of them was about to replace.

    To be called under the lock. What was done is logged, and returned.
    """
    done = []
    for old in _beside(path, "old"):
        # killed between two renames: what was there before is whole, what came after may not be
        if any(old.iterdir()) and not path.exists():
            old.replace(path)
            done.append(f"put {path} back, which a killed run had set aside")
        else:
            _remove(old)
            done.append(f"removed {old.name}, an artefact that had been replaced")
    for partial in _beside(path, "partial"):
        size = _size(partial)
        _remove(partial)
        done.append(f"removed {partial.name} ({size / 1e6:.1f} MB), left unfinished by a killed run")
    for line in done:
        log.warning("%s", line)
    return done


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


def _acquire(lock: Path, path: Path, wait: bool) -> int | None:
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _same_file(descriptor, lock):
                with suppress(OSError):  # on a full disk the lock holds all the same, only without a name
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return descriptor
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise TargetError(f"another run{owner} is writing {path}; wait for it, or give another path") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _owner(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {told['pid']} on {told['host']})"
    except (ValueError, KeyError, TypeError):  # it has only just got the lock
        return ""


def _beside(path: Path, kind: str) -> list[Path]:
    # the random part has no dot, so that what belongs to a path called "x.partial-1" is not taken for that of "x"
    pattern = re.compile(re.escape(f".{path.name}.{kind}-") + r"[^.]*")
    return sorted(found for found in path.parent.iterdir() if pattern.fullmatch(found.name))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [Path(root) / name for root, _, names in os.walk(path) for name in names]
    return sum(file.lstat().st_size for file in files)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
