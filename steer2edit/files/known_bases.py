"""Where the base folders of this computer lie, by fingerprint.

An artefact never holds a path, since it may be published. So a note outside every artefact tells ``verify`` where to find a
base that is a local folder: one small file in the user's cache folder. A note is a hint: whoever follows it checks the
fingerprint.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from steer2edit.files.cache_folder import cache_folder, write_cached
from steer2edit.files.untrusted import read_bytes

_PATH_BYTES = 1 << 16


def remember(fingerprint: str, folder: Path) -> None:
    """Note where a base lies. Where the cache cannot be written, nothing is noted: ``--base`` names the base then."""
    with suppress(OSError):
        write_cached(_note(fingerprint), os.fsencode(folder.resolve()))


def recall(fingerprint: str) -> Path | None:
    """The folder that was noted for a fingerprint; None without a note, or where the folder is gone."""
    try:
        folder = Path(os.fsdecode(read_bytes(_note(fingerprint), _PATH_BYTES)))
        return folder if folder.is_absolute() and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def _note(fingerprint: str) -> Path:
    # a fingerprint from a stranger's plan may be any text
    return cache_folder() / "bases" / hashlib.sha256(fingerprint.encode("utf-8", "surrogatepass")).hexdigest()
