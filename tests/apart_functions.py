"""Functions that test_sandbox.py runs in a child process."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import torch

from steer2edit.errors import DataError


def back(*values: Any) -> Any:
    return list(values)


def tensors() -> Any:
    return {(1, "a"): torch.arange(6).view(2, 3), 2: [torch.ones(2, dtype=torch.bfloat16), (None, True, 1.5, b"x")]}


def sleep() -> None:
    time.sleep(600)


def spin_in_c() -> None:
    sum(range(10**12))


def take_memory() -> int:
    return len(bytearray(8 << 30))


def print_much() -> str:
    for _ in range(300):
        print("x" * 100_000)
    return "done"


def return_much() -> str:
    return "x" * 30_000_000


def refuse() -> None:
    raise DataError("line one\nline two")


def fail() -> None:
    raise RuntimeError("inner\nmore")


def die() -> None:
    os.abort()


def object_of_another_class() -> Any:
    return object()


def working_folder() -> str:
    return os.getcwd()


def be_slow_to_end() -> None:
    atexit.register(time.sleep, 1.5)


def end() -> None:
    os._exit(0)
