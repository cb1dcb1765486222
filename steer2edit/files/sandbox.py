"""Limits on what a stranger's code or file may take: time, memory and output.

:func:`limited` guards a block in this process: Python code and regular expressions. :class:`Apart` runs functions in a child
process, which can be killed whatever it does: parsers written in C, chat templates.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from steer2edit import errors
from steer2edit.errors import Steer2EditError, first_line

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]


_LENGTH = 8
_START_SECONDS = 600.0
_END_SECONDS = 20.0
"""How long a process whose pipe is closed may take to end, on a busy machine."""


class TooMuchError(Exception):
    """It took more time, memory or output than it was allowed."""


class _EndedError(Exception):
    """The child process had ended by itself, without a fault, when it was called."""


class ApartError(Exception):
    """A function in a child process raised an error that is not one of ours, or the process died."""


@dataclass(frozen=True)
class Limits:
    """What one call in a child process may take: wall-clock ``seconds``, bytes of ``memory``, bytes of ``output``.

    ``memory`` counts what the process takes beside its interpreter and libraries; systems without ``resource`` (Windows)
    do not limit it.
    """

    seconds: float = 60.0
    memory: int = 4 << 30
    output: int = 1 << 30


class Apart:
    """A child process that runs functions of this package, one call after the other, within :class:`Limits`.

    ``with Apart(Limits(5)) as apart: apart.call(function, *arguments)``. The process is a fresh interpreter, not a fork, so
    that no thread or lock of this process is in it. It starts with the first call, and starts again after it was killed.
    With ``idle`` it ends by itself, where the system allows it, after so many seconds without a call.
    Functions are known by module and name. Arguments and results are plain values (None, bool, int, float, str, bytes, list,
    tuple, dict) and, in results, dense tensors.
    """

    def __init__(self, limits: Limits = Limits(), idle: float | None = None) -> None:
        self._limits, self._idle = limits, idle
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function(*arguments)`` returns in the child, in this process's working folder of now.

        Raises the function's own Steer2EditError; TooMuchError where a limit is reached; ApartError for any other error, and
        where the process dies.
        """
        from steer2edit.files.messages import pack, unpack

        request = pack([_working_folder(), function.__module__, function.__qualname__, list(arguments)])
        try:
            if self._process is not None and self._process.poll() is not None:
                self.close()
            if self._process is None:
                self._start(function.__module__)
            try:
                raw = self._exchange(request, self._limits.seconds, self._limits.output)
            except _EndedError:
                # it was idle for long, and on its way out when this call came: a new one takes it
                self.close()
                self._start(function.__module__)
                raw = self._exchange(request, self._limits.seconds, self._limits.output)
        except _EndedError:
            self.close()
            raise ApartError("the process that read it ended") from None
        except BaseException:
            self.close()
            raise
        outcome = unpack(raw)
        if outcome[0] == "result":
            return outcome[1]
        _, name, message = outcome
        if name == "MemoryError":
            raise TooMuchError(f"it wants more than {self._limits.memory / 1e9:.1f} GB of memory")
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, Steer2EditError):
            raise kind(message)
        raise ApartError(message)

    def close(self) -> None:
        """Kill the child process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()

    def _start(self, module: str) -> None:
        settings = {"memory": self._limits.memory, "idle": self._idle, "module": module}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from steer2edit.files.sandbox import serve; serve()", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._exchange(None, _START_SECONDS, 100)

    def _exchange(self, request: bytes | None, seconds: float, largest: int) -> bytes:
        """Send a message and read the answer. A thread reads, so that waiting can end on every system."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answer: list[bytes | BaseException] = []
        sending, receiving = process.stdin, process.stdout

        def talk() -> None:
            try:
                if request is not None:
                    _send(sending, request)
                answer.append(_receive(receiving, largest))
            except (OSError, ValueError, EOFError, TooMuchError) as error:
                answer.append(error)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        thread.join(seconds)
        if not answer:
            process.kill()
            thread.join()
            raise TooMuchError(f"it took longer than {seconds:g} seconds")
        if isinstance(answer[0], TooMuchError):
            raise answer[0]
        if isinstance(answer[0], BaseException):
            code = _code_of(process, seconds=0.0 if isinstance(answer[0], ValueError) else _END_SECONDS)
            if code == 0:
                raise _EndedError
            raise ApartError(f"the process that read it died (exit code {code})")
        return answer[0]


def _code_of(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process whose pipe is closed.

    It is killed where it does not end within so many seconds.
    """
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run_apart(function: Callable[..., Any], *arguments: Any, limits: Limits = Limits()) -> Any:
    """One call in a child process of its own; see :meth:`Apart.call`."""
    with Apart(limits) as apart:
        return apart.call(function, *arguments)


def serve() -> None:
    """The child's side: answer calls until the pipe is closed."""
    from steer2edit.files.messages import pack, unpack

    settings = json.loads(sys.argv[1])
    receiving = os.fdopen(os.dup(0), "rb")
    sending = os.fdopen(os.dup(1), "wb")
    # what the function prints goes nowhere: the pipe is for answers
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    importlib.import_module(settings["module"])
    _limit_process(settings["memory"])
    _send(sending, b"ready")
    while True:
        if settings["idle"] and os.name == "posix" and not select.select([receiving], [], [], settings["idle"])[0]:
            return
        try:
            folder, module, name, arguments = unpack(_receive(receiving, 1 << 40))
        except EOFError:
            return
        try:
            if folder is not None:  # the parent's may have changed since the last call
                os.chdir(folder)
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = pack(["result", function(*arguments)])
        except MemoryError:
            answer = pack(["error", "MemoryError", ""])
        except BaseException as error:  # whatever a foreign parser raises, a Rust library's PanicException too
            message = str(error) if isinstance(error, Steer2EditError) else first_line(error)
            answer = pack(["error", type(error).__name__, message[:100_000]])
        _send(sending, answer)


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _limit_process(memory: int) -> None:
    status = Path("/proc/self/statm")
    if resource is None or not status.is_file():
        return
    limit = int(status.read_text().split()[0]) * resource.getpagesize() + memory
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(_LENGTH, "little") + message)
    pipe.flush()


def _receive(pipe: IO[bytes], largest: int) -> bytes:
    prefix = pipe.read(_LENGTH)
    if len(prefix) < _LENGTH:
        raise EOFError
    length = int.from_bytes(prefix, "little")
    if length > largest:
        raise TooMuchError(f"it becomes {length / 1e6:.1f} MB, and at most {largest / 1e6:.1f} MB are read")
    message = pipe.read(length)
    if len(message) < length:
        raise EOFError
    return message


@contextmanager
def limited(seconds: float, memory: int | None = None) -> Iterator[None]:
    """Raise TooMuchError in the block after ``seconds``, and MemoryError where it wants more than ``memory`` bytes.

    Python code and regular expressions are interrupted. Without effect outside the main thread, and of the clock where
    somebody else has set it: there is one for a whole process.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        with memory_limited(memory):
            yield
        return

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TooMuchError(f"it took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with memory_limited(memory):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limited(allowed: int | None) -> Iterator[None]:
    """Let the block take ``allowed`` bytes beside what this process has; without effect where the system cannot."""
    status = Path("/proc/self/statm")
    if allowed is None or resource is None or not status.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(status.read_text().split()[0]) * resource.getpagesize() + allowed
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
