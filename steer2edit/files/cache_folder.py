"""Where this program keeps what only saves time: the user's cache folder.

It is ``STEER2EDIT_CACHE``, or ``XDG_CACHE_HOME/steer2edit``, or ``~/.cache/steer2edit``. Everything in it may be removed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder; it need not exist."""
    own, shared = os.environ.get("STEER2EDIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return Path(shared).expanduser() / "steer2edit" if shared else Path("~/.cache/steer2edit").expanduser()


def write_cached(path: Path, data: bytes) -> None:
    """Write one file of the cache, whole or not at all, for this user alone. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
