"""Running chat templates and tokenizers, which are strangers' programs, in a child process with limits.

Each tokenizer has one child process, which is started at its first use: when it is loaded, before a model takes memory.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from steer2edit.errors import DataError
from steer2edit.files.forked import Forked
from steer2edit.files.sandbox import ApartError, Limits, TooMuchError
from steer2edit.notices import collected, notice

_SECONDS = 30.0
_SECONDS_A_CHARACTER = 1e-4
_BYTES = 2 << 30
_BYTES_A_CHARACTER = 1000
"""Time and memory that a call may take, and those for each character that it reads."""

_children: WeakKeyDictionary[Any, Forked] = WeakKeyDictionary()


def run_foreign(tokenizer: Any, work: Callable[..., Any], *arguments: Any, characters: int, what: str) -> Any:
    """The JSON value of ``work(tokenizer, *arguments)`` for so many ``characters``, computed in the tokenizer's child process.

    ``work`` is a function of a module. Its notices are said here. Raises DataError where ``work`` does, and where ``what`` ("the
    chat template") breaks off or takes too much.
    """
    child = _children.get(tokenizer)
    if child is None:
        child = _children[tokenizer] = Forked(_server(tokenizer))
    # the template may have changed since the child was started
    request = pickle.dumps((getattr(tokenizer, "chat_template", None), work, arguments))
    limits = Limits(
        seconds=_SECONDS + _SECONDS_A_CHARACTER * characters,
        memory=_BYTES + _BYTES_A_CHARACTER * characters,
        output=_BYTES_A_CHARACTER * characters + (16 << 20),
    )
    try:
        packed, texts = child.call(request, limits)
    except TooMuchError as error:
        raise DataError(f"{what} takes too much: {error}") from None
    except ApartError as error:
        raise DataError(f"{what} fails: {error}") from None
    for text in texts:
        notice(text)
    return json.loads(packed)


def _server(tokenizer: Any) -> Callable[[bytes], Any]:
    """What answers requests about a tokenizer; it does not keep the tokenizer alive."""
    reference = ref(tokenizer)

    def serve(request: bytes) -> list[Any]:
        template, work, arguments = pickle.loads(request)
        tokenizer = reference()
        if tokenizer is not None and getattr(tokenizer, "chat_template", None) != template:
            tokenizer.chat_template = template
        with collected() as texts:
            value = work(tokenizer, *arguments)
        return [json.dumps(value), texts]  # as one text: there may be millions of numbers

    return serve
