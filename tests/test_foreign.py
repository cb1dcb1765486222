"""What strangers' templates and tokenizers do happens in a child process that is ended where it takes too much."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_templates import CHATML
from test_tokens import make_tokenizer

from steer2edit.data import foreign
from steer2edit.data.contrast import Example
from steer2edit.data.templates import render_prompt
from steer2edit.data.tokens import encode, texts_of, token_ids, windows
from steer2edit.errors import CheckpointError, DataError
from steer2edit.files import forked
from steer2edit.files.forked import Forked, can_fork
from steer2edit.files.sandbox import ApartError, Limits, TooMuchError
from steer2edit.notices import collected, notice
from steer2edit.runtime.model import load_tokenizer

pytestmark = pytest.mark.skipif(not can_fork(), reason="work runs in this process on this system")


def child(work: Callable[[], Any], seconds: float = 20, memory: int = 1 << 30, output: int = 4 << 20) -> Any:
    process = Forked(lambda _request: work())
    try:
        return process.call(b"", Limits(seconds, memory, output))
    finally:
        process.close()


# The child


def test_a_child_gives_bytes_and_changes_nothing_here(capfd: pytest.CaptureFixture[str]) -> None:
    changed: list[int] = []

    def work() -> bytes:
        changed.append(1)
        print("heard by nobody")
        os.write(2, b"nor this")
        return str(os.getpid()).encode() + b"\0\xff"

    found = child(work)
    assert found.endswith(b"\0\xff") and found[:-2] != str(os.getpid()).encode()
    assert changed == [] and capfd.readouterr() == ("", "")
    assert child(lambda: b"") == b""
    big = bytes(range(256)) * 4000
    assert child(lambda: big) == big


def test_an_error_in_a_child_is_told_here() -> None:
    def work() -> bytes:
        raise KeyError("no such thing\ud800")

    with pytest.raises(ApartError, match=r"no such thing.* \(KeyError\)"):
        child(work)


def sleeps() -> bytes:
    time.sleep(60)
    return b""


def computes() -> bytes:
    return str(10 ** (10**9) % 7).encode()


@pytest.mark.parametrize("work", [sleeps, computes])
def test_time_is_limited_whatever_runs(work: Callable[[], bytes]) -> None:
    started = time.monotonic()
    with pytest.raises(TooMuchError, match=r"took longer than 0\.5 seconds|memory"):
        child(work, seconds=0.5)
    assert time.monotonic() - started < 10


def test_memory_output_and_crashes_are_limited() -> None:
    with pytest.raises(TooMuchError, match=r"more than 0\.1 GB of memory"):
        child(lambda: bytes(10**9), memory=10**8)
    with pytest.raises(TooMuchError, match=r"gives 6\.7 MB, and at most 1\.0 MB"):
        child(lambda: bytes(5 * 10**6), output=10**6)
    with pytest.raises(TooMuchError, match=r"crashes \(signal 11\)"):
        child(lambda: os.kill(os.getpid(), signal.SIGSEGV) or b"")  # type: ignore[func-returns-value]
    with pytest.raises(TooMuchError, match=r"crashes \(exit code 3\)"):
        child(lambda: os._exit(3))


def test_a_thread_may_have_a_child_and_none_is_left_behind() -> None:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(child(lambda: str(os.getpid()).encode())))
    thread.start()
    thread.join()
    assert len(found) == 1 and int(found[0]) != os.getpid()
    # tokenizers that other tests hold have children of their own
    with pytest.raises(ChildProcessError):
        os.waitpid(int(found[0]), os.WNOHANG)


def test_where_there_are_no_children_the_same_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "can_fork", lambda: False)
    assert child(lambda: str(os.getpid()).encode()) == str(os.getpid()).encode()
    with pytest.raises(TooMuchError, match="took longer"):
        child(sleeps, seconds=0.2)
    with pytest.raises(ApartError, match=r"division .*\(ZeroDivisionError\)"):
        child(lambda: bytes(1 // 0))
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(DataError, match="drops the user message"):
        render_prompt("a", make_tokenizer("nothing"))
    assert encode([Example("a", "b", "positive", "here", 0)], tokenizer)


def says_slow(_tokenizer: Any, value: int) -> int:
    notice("slow")
    return value


def test_notices_of_a_child_are_said_here() -> None:
    with collected() as texts:
        assert foreign.run_foreign(make_tokenizer(), says_slow, 3, characters=1, what="it") == 3
    assert texts == ["slow"]


# Templates and tokenizers


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_SECONDS", 1.0)
    monkeypatch.setattr(foreign, "_BYTES", 300 << 20)


@pytest.mark.parametrize(
    "template",
    [
        "{% set n = 10 ** 9 %}{{ 7 ** n }}",
        "{{ (messages[0].content * 50000000).count('ab' * 20000000) }}",
        "{{ 'a' * 4000000000 }}",
    ],
    ids=["a power", "a search", "a string"],
)
def test_a_template_that_cannot_be_interrupted_is_ended(template: str, impatient: None) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="the chat template"):
        render_prompt("ab", make_tokenizer(template))
    assert time.monotonic() - started < 15


def multiplying(times: int) -> Any:
    """A tokenizer whose normaliser makes ten of each "a", so many times over."""
    import tokenizers

    tokenizer = make_tokenizer()
    ten = tokenizers.normalizers.Replace("a", "a" * 10)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Sequence([ten] * times)
    return tokenizer


@pytest.mark.parametrize(
    ("times", "told"), [(3, "makes 1001 tokens of 1 characters"), (30, "the tokenizer takes too much")]
)
def test_a_tokenizer_that_multiplies_text_is_refused(times: int, told: str, impatient: None, tmp_path: Path) -> None:
    tokenizer = multiplying(times)
    with pytest.raises(DataError, match=told):
        token_ids(tokenizer, ["a"])
    with pytest.raises(DataError, match="the tokenizer"):
        windows(tokenizer, ["a"], 100)
    with pytest.raises(DataError, match="tokenizer"):
        encode([Example("a", "a", "positive", "here", 0)], tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer of"):
        load_tokenizer(tmp_path)


def test_a_decoder_that_multiplies_text_is_refused(impatient: None) -> None:
    import tokenizers

    tokenizer = make_tokenizer()
    rows = [tokenizer("a" * 30)["input_ids"], [], tokenizer("b")["input_ids"]]
    assert texts_of(tokenizer, []) == []
    assert texts_of(tokenizer, rows) == ["a" * 30, "", "b"]
    ten = tokenizers.decoders.Replace("a", "a" * 10)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Sequence([ten] * 30)
    with pytest.raises(DataError, match="the tokenizer's decoder takes too much"):
        texts_of(tokenizer, rows)


def test_ordinary_text_is_far_below_the_limit() -> None:
    tokenizer = make_tokenizer()
    assert token_ids(tokenizer, []) == []
    for text in ("", "a", "🙂" * 50, "ﷺ\u0301" * 30, "\n" * 99):
        assert token_ids(tokenizer, [text, "b"]) == tokenizer([text, "b"])["input_ids"]
    assert (
        token_ids(tokenizer, ["a"], add_special_tokens=False) == tokenizer(["a"], add_special_tokens=False)["input_ids"]
    )
