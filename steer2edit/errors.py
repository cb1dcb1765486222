"""The errors that a user can mend, and helpers that put values from files into messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

# all but line feed and tab: a name from a file may not move the cursor, hide text or reverse it
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# up to the last @ before the path: a password may hold one
_URL_PASSWORD = re.compile(r"(\b[a-zA-Z][\w+.-]*://[^\s/?#:@\"']*):[^\s/\"']*@")
_QUERY_PASSWORD = re.compile(r"(?i)([?&;](?:password|passwd|pwd|token|secret|key)=)[^\s&;#\"']+")


class Steer2EditError(Exception):
    """Base class of every error that the input causes. The command line prints it and exits with code 2."""


class ArchitectureError(Steer2EditError):
    """The model's layout is not understood, or not every residual writer was found."""


class CheckpointError(Steer2EditError):
    """A checkpoint's files are missing, damaged, or contradict each other."""


class DataError(Steer2EditError):
    """Contrast data that cannot be used."""


class PlanError(Steer2EditError):
    """A plan or statistics file that is damaged, or made for another model."""


class TargetError(Steer2EditError):
    """A plan that cannot be lowered to the target that was asked for."""


class HubError(Steer2EditError):
    """The Hub could not be reached, or refused a request."""


class EngineError(Steer2EditError):
    """What writes answers could not be reached, refused a request, or gave something else than an answer."""


def listing(problems: Iterable[str], limit: int = 10) -> str:
    """Problems as an indented list, one in each line; past ``limit`` only their number."""
    every = list(problems)
    lines = [f"  - {problem}" for problem in every[:limit]]
    if len(every) > limit:
        lines.append(f"  … and {len(every) - limit} more")
    return "\n".join(lines)


def shown(value: object) -> str:
    """A value from a file, for a message: the beginning of its JSON."""
    if isinstance(value, str):
        value = value[:60] + "…" * (len(value) > 60)
    elif isinstance(value, (list, tuple)):
        value = list(value[:8])
    elif isinstance(value, dict):
        return f"an object with {count_of(len(value), 'key')}"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 80 else f"{text[:80]}…"


def count_of(count: int, one: str, several: str | None = None, style: str = "") -> str:
    """A number with its noun: 1 token, 2 tokens. ``style`` formats the number, as in format().

    ``one`` and ``several`` may hold a verb too, as "request was" and "requests were".
    """
    return f"{count:{style}} {one if count == 1 else several or one + 's'}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or the name of its class where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def brief(path: object) -> str:
    """A path or name for a message. Past 300 characters the middle is left out."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:200]}…{text[-60:]}"


def without_passwords(text: object) -> str:
    """A text in which the password of every URL is replaced by stars: ``scheme://user:***@host`` and ``?password=***``."""
    hidden = _URL_PASSWORD.sub(r"\1:***@", str(text))
    return _QUERY_PASSWORD.sub(r"\1***", hidden)


def printable(text: str) -> str:
    """A text for the terminal, with control characters written as escapes."""
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)
