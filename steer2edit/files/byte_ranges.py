"""Copy byte ranges from file to file, by the kernel where that is possible.

A file system that shares blocks then copies nothing.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from steer2edit.errors import TargetError

COPY_BYTES = 64 << 20
_BUFFER = 8 << 20
_NO_SUCH_CALL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def copy_range(source: Path, start: int, target: Path, at: int, count: int) -> int:
    """Copy ``count`` bytes at ``start`` of one file to ``at`` of another, which exists; ``count``. Raises TargetError."""
    try:
        with open(source, "rb", buffering=0) as reading, open(target, "r+b", buffering=0) as writing:
            done = 0
            while done < count:
                copied = _copy_some(reading.fileno(), start + done, writing.fileno(), at + done, count - done)
                if not copied:
                    raise TargetError(f"{source.name} became shorter: it was changed while it was read")
                done += copied
    except OSError as error:
        raise TargetError(f"cannot copy {source.name}: {error.strerror or error}") from None
    return count


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _copy_some(source: int, start: int, target: int, at: int, count: int) -> int:
    """Copy at most ``count`` bytes; how many, 0 at the end of the source. Raises OSError."""
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, count, start, at)
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise
        else:
            return copied
    data = os.pread(source, min(count, _BUFFER), start)
    write_at(target, memoryview(data), at)
    return len(data)
