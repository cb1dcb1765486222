"""A fallback that costs time, memory or a part of the result is told in a notice, once, with its reason.

Prompts that cannot be shared are in test_likelihood.py, parts of a checkpoint that do not run in test_loading.py.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_tiny
from family_configs import family_config
from fp8_models import quantise

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.files import locks
from steer2edit.notices import collected
from steer2edit.report.page import write_pages
from steer2edit.runtime.model import Runtime, load_model, load_weights
from steer2edit.strength.kl import NeutralText
from steer2edit.targets.checkpoint import _link

TEXT = ["the cat is old . " * 8]


@pytest.mark.parametrize("capped", [False, True])
def test_a_kl_that_needs_two_unembeddings_is_told(capped: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family_config("gemma2", final_logit_softcapping=2.0 if capped else None))
    checkpoint = open_checkpoint(folder)
    with collected() as notices:
        NeutralText(load_model(checkpoint, read_spec(checkpoint)), TEXT, window=20)
    assert [text.partition(" are not")[0] for text in notices] == ["the model's logits"] * capped


def test_fp8_that_is_loaded_as_other_numbers_is_told(tmp_path: Path) -> None:
    folder = quantise(save_tiny(tmp_path / "wide", llama_config(), torch.bfloat16), tmp_path / "fp8")
    with collected() as notices:
        load_weights(folder, Runtime(dtype="float32"))
        load_weights(folder, Runtime(dtype="float32"))
    assert notices == [f"{folder} is in fp8, which this device does not run: it is loaded as float32 numbers"]


def test_shards_that_are_copied_and_not_linked_are_told(
    tiny_llama_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    checkpoint = open_checkpoint(tiny_llama_bf16)
    monkeypatch.setattr(os, "link", refuse)
    with collected() as notices:
        assert not any(_link(checkpoint, shard, tmp_path / "out.partial") for shard in checkpoint.shards)
    assert notices == [f"unedited shards are copied: they cannot be linked into {tmp_path} (Invalid cross-device link)"]


def test_a_page_that_is_not_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "matplotlib" and find(name, *rest))
    with collected() as notices:
        write_pages(None, None, [])  # type: ignore[arg-type]
    assert len(notices) == 1 and "pip install 'steer2edit[plots]'" in notices[0]


def test_a_system_without_file_locks_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with collected() as notices:
        for _ in range(2):
            with locks.exclusive(tmp_path / "out"):
                pass
    assert len(notices) == 1 and "no file locks" in notices[0]
