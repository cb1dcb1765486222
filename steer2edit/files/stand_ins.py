"""Files that stand in for another: a Git LFS pointer, a web page, a dangling link."""

from __future__ import annotations

import os
from pathlib import Path

from steer2edit.files.untrusted import open_regular

_FIRST_BYTES = 512
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")


def stand_in(path: Path) -> str | None:
    """Say what a file is if it is not what its name promises, and what to do.

    None for any other file.

    Recognised are Git LFS pointers, and HTML or XML pages such as a server's answer to a refused download.
    """
    try:
        with open_regular(path) as file:
            first = file.read(_FIRST_BYTES)
    except (OSError, ValueError):
        return None
    if first.startswith(_LFS):
        return (
            f"{path.name!r} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository, "
            "or download the file again"
        )
    if first.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return (
            f"{path.name!r} is a web page (HTML or XML), not the file itself: a server's message was saved under its name; "
            "download the file again (a gated repository needs a login)"
        )
    return None


def read_failure(path: Path, error: OSError | ValueError) -> str:
    """Why a file cannot be read, in a few words; a link to nothing is called so."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which does not exist (a download that was not finished?)"
    # ValueError: a name that no file system takes
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
