"""Lock files: one run at a time writes a path.

The lock of NAME is the file ``.NAME.lock`` beside it. The operating system holds the lock for the process, and releases it
when the process dies. So a run that gets the lock knows that no other run is at work there, and removes what a killed run
left (:mod:`steer2edit.files.workplace`).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from steer2edit.errors import TargetError, brief
from steer2edit.files.workplace import is_process_mark, process_mark, settle_leftovers
from steer2edit.notices import notice

try:
    import fcntl
except ImportError:  # no such locks on this system: two runs that write one path are not noticed, leftovers stay
    fcntl = None  # type: ignore[assignment]

_LOCK_BYTES = 1000
# the paths this run has locked, so that its own writing does not wait for itself
_claims: ContextVar[frozenset[Path]] = ContextVar("claims", default=frozenset())


@contextmanager
def exclusive(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock ``path`` within the block, and remove first what killed runs left beside it.

    Raises TargetError where another run has the lock, unless ``wait`` is set, and where the lock file's name is taken by
    something that is not a lock file of ours.
    """
    if fcntl is None:
        notice("this system has no file locks: another run that writes to the same place is not noticed")
        yield
        return
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
        # removed while it is still locked: a waiting run sees that the name is gone, or another's, and starts again
        with suppress(FileNotFoundError):
            lock.unlink()
        os.close(descriptor)


@contextmanager
def claimed(paths: Iterable[Path]) -> Iterator[None]:
    """Lock ``paths`` for all that runs within the block: for work that takes long before it writes.

    Raises TargetError where another run has one of them.
    """
    with ExitStack() as stack:
        wanted = [path.expanduser() for path in paths]
        for path in wanted:
            try:
                stack.enter_context(_folder(path.parent))
                stack.enter_context(exclusive(path))
            except OSError as error:
                raise TargetError(f"cannot write {brief(path)}: {error.strerror or error}") from None
        token = _claims.set(_claims.get() | {_key(path) for path in wanted})
        try:
            yield
        finally:
            _claims.reset(token)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """A block in which the folder exists.

    Folders that had to be made for it are removed afterwards, if they are still empty.
    """
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in new:
            with suppress(OSError):
                one.rmdir()


def _key(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _acquire(lock: Path, path: Path, wait: bool) -> int:
    while True:
        descriptor = _open(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _same_file(descriptor, lock):
                # looked at under the lock, before anything is written: the name may be somebody else's file
                _check_lock_file(descriptor, lock)
                with suppress(OSError):  # on a full disk the lock holds all the same, only without a name
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, process_mark(), 0)
                return descriptor
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise TargetError(f"another run{owner} is writing {path}; wait for it, or give another path") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(lock: Path) -> int:
    """A descriptor of the lock file, opened without following a link and without changing a byte."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(lock, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise _taken(lock, "a symbolic link" if lock.is_symlink() else "not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _taken(lock, "not a regular file")
    return descriptor


def _check_lock_file(descriptor: int, lock: Path) -> None:
    """Raise TargetError unless the file is empty or holds a process's mark, and has no other name."""
    status = os.fstat(descriptor)
    if status.st_nlink > 1:
        raise _taken(lock, "a file with a second name (a hard link)")
    if status.st_size and not (
        status.st_size <= _LOCK_BYTES and is_process_mark(os.pread(descriptor, _LOCK_BYTES, 0).rstrip(b"\0"))
    ):
        raise _taken(lock, "a file with other content")


def _taken(lock: Path, what: str) -> TargetError:
    return TargetError(
        f"{lock} should be a lock file of steer2edit, but is {what}; move it away, or give another output"
    )


def _same_file(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def _owner(descriptor: int) -> str:
    try:
        mark = json.loads(os.pread(descriptor, _LOCK_BYTES, 0))
        return f" (process {mark['pid']} on {mark['host']})"
    except (ValueError, KeyError, TypeError, RecursionError):  # it has only just got the lock
        return ""
