"""A forked child process, for work on objects in the memory of this process.

An example is a tokenizer, which no file holds as it is now.

``sandbox.Apart`` starts a fresh interpreter, which suits files; for a tokenizer it would import transformers anew, which takes
seconds. A fork takes milliseconds, and exists on Linux alone; elsewhere the work runs in this process, with ``sandbox.limited``.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import os
import select
import signal
import struct
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from steer2edit import errors
from steer2edit.errors import Steer2EditError
from steer2edit.files.messages import pack, unpack
from steer2edit.files.sandbox import ApartError, Limits, TooMuchError, limited, memory_limited

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

_REQUEST = struct.Struct("<dQQ")
"""Before a request: the seconds and bytes of memory that it may take, and its length."""
_ANSWER = struct.Struct("<Q")
"""Before an answer: its length."""
_MESSAGE = 10_000
"""Of an error's message in a child process, so many characters come back."""


def can_fork() -> bool:
    """Whether this system forks child processes (Linux)."""
    return hasattr(os, "fork") and sys.platform == "linux" and resource is not None


class Forked:
    """A copy of this process that answers requests by ``serve``, and is killed where one takes too much.

    It has what this process held when the first request came, and nothing that it changes comes back. It must not use a GPU,
    nor threads that already ran; what it prints is dropped. It ends with this object or this process. One that was killed is
    followed by a new one at the next request.
    """

    def __init__(self, serve: Callable[[bytes], Any]) -> None:
        self._serve = serve
        self._lock = threading.Lock()
        self._end: weakref.finalize[..., Forked] | None = None
        self._requests = self._answers = -1

    def call(self, request: bytes, limits: Limits) -> Any:
        """The plain value that ``serve`` makes of a request.

        Raises ``serve``'s own Steer2EditError; TooMuchError beyond the limits, and where the child dies; ApartError for any other
        error.
        """
        if not can_fork():
            return self._call_here(request, limits)
        with self._lock:
            if self._end is None or not self._end.alive:
                self._start()
            deadline = time.monotonic() + limits.seconds
            try:
                with suppress(BrokenPipeError):  # what became of the child is found out below
                    _send(self._requests, _REQUEST.pack(limits.seconds, limits.memory, len(request)) + request)
                (size,) = _ANSWER.unpack(_receive(self._answers, _ANSWER.size, deadline, limits.seconds))
                if size > max(limits.output, 8 * _MESSAGE):
                    raise TooMuchError(
                        f"it gives {size / 1e6:.1f} MB, and at most {limits.output / 1e6:.1f} MB are read"
                    )
                answer = _receive(self._answers, size, deadline, limits.seconds)
            except EOFError:
                status = self.close()
                ended = f"signal {-status}" if status < 0 else f"exit code {status}"
                raise TooMuchError(f"{_too_large(limits)}, or crashes ({ended})") from None
            except BaseException:
                self.close()
                raise
        outcome = unpack(answer)
        if outcome[0] == "result":
            return outcome[1]
        raise _error(outcome[1], outcome[2], limits)

    def close(self) -> int:
        """End the child, if there is one; its exit code, negative where a signal ended it."""
        return (self._end() or 0) if self._end is not None else 0

    def _start(self) -> None:
        their_requests, self._requests = os.pipe()
        self._answers, their_answers = os.pipe()
        with warnings.catch_warnings():
            # other threads are not copied: nothing that is served needs one of them
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _run_as_child(self._serve, their_requests, their_answers)
        os.close(their_requests)
        os.close(their_answers)
        self._end = weakref.finalize(self, _end, child, self._requests, self._answers, os.getpid())

    def _call_here(self, request: bytes, limits: Limits) -> Any:
        try:
            with limited(limits.seconds, limits.memory):
                return self._serve(request)
        except (TooMuchError, Steer2EditError):
            raise
        except Exception as error:  # whatever the work raises, as in a child
            raise _error(type(error).__name__, _message(error), limits) from None


def _end(child: int, requests: int, answers: int, parent: int) -> int:
    if os.getpid() != parent:
        return 0  # a copy of the parent has no children of the parent's
    for descriptor in (requests, answers):
        os.close(descriptor)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # one that has ended by itself keeps its own exit code
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:
        return 0


def _run_as_child(serve: Callable[[bytes], Any], requests: int, answers: int) -> NoReturn:
    """Serve requests until their pipe is closed; nothing of the parent's is flushed or cleaned up here."""
    try:
        gc.disable()  # what the parent left for collection may belong to its GPU
        faulthandler.disable()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends its children
        sink = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(sink, descriptor)
        sys.stdout = sys.stderr = io.StringIO()
        # locks and the pipes of other children are the parent's alone
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in (requests, answers):
                with suppress(OSError):
                    os.close(int(name))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            seconds, memory, size = _REQUEST.unpack(_receive(requests, _REQUEST.size))
            request = _receive(requests, size)
            # should the parent be gone, the child ends by itself
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            limit = int(used + 2 * seconds * (os.cpu_count() or 1)) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            try:
                with memory_limited(memory):
                    answer = pack(["result", serve(request)])
            except BaseException as error:  # a Rust library's PanicException too
                answer = pack(["error", type(error).__name__, _message(error)])
            _send(answers, _ANSWER.pack(len(answer)) + answer)
    finally:
        os._exit(0)


def _send(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[: 1 << 20]) :]


def _receive(descriptor: int, size: int, deadline: float | None = None, seconds: float = 0.0) -> bytes:
    """So many bytes from a pipe. Raises EOFError where it ends before, and TooMuchError after the deadline."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN | select.POLLHUP)
    pieces = bytearray()
    while len(pieces) < size:
        if deadline is not None and not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TooMuchError(f"it took longer than {seconds:g} seconds")
        piece = os.read(descriptor, min(size - len(pieces), 1 << 20))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)


def _message(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.encode("utf-8", "replace").decode("utf-8")[:_MESSAGE]


def _too_large(limits: Limits) -> str:
    return f"it wants more than {limits.memory / 1e9:.1f} GB of memory"


def _error(name: str, message: str, limits: Limits) -> Exception:
    """The error to raise here for one that the work raised."""
    if name == "MemoryError":
        return TooMuchError(_too_large(limits))
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, Steer2EditError):
        return kind(message)
    return ApartError(f"{message} ({name})")
