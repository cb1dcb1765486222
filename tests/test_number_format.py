"""A model runs in the stored format, or in float32 where a CPU would be slow in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer2edit.runtime import number_format
from steer2edit.runtime.model import Runtime, load_weights
from steer2edit.runtime.number_format import resolved_dtype

CPU, OTHER = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_stored_in_bfloat16(
    tiny_llama_bf16: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(number_format, "multiplies_bfloat16", lambda: fast)
    assert load_weights(tiny_llama_bf16).dtype is dtype
    assert load_weights(tiny_llama_bf16, Runtime(dtype="float32")).dtype is torch.float32
    assert resolved_dtype("auto", OTHER, tiny_llama_bf16) == "auto"


def test_other_stored_formats_run_in_float32_on_a_cpu(tiny_llama: Path, tmp_path: Path) -> None:
    assert resolved_dtype("auto", CPU, tiny_llama) == resolved_dtype("auto", CPU, tmp_path) == "float32"
    for key, inner in (("dtype", False), ("torch_dtype", False), ("dtype", True)):
        config = f'{{"{key}": "float16"}}'
        (tmp_path / "config.json").write_text(f'{{"text_config": {config}}}' if inner else config)
        assert number_format.stored_dtype(tmp_path) == "float16"
        assert resolved_dtype("auto", CPU, tmp_path) == "float32"


def test_torch_is_asked_in_the_way_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, answer in (({"avx512_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)):
        number_format.multiplies_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert number_format.multiplies_bfloat16() is answer
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    number_format.multiplies_bfloat16.cache_clear()
    assert number_format.multiplies_bfloat16() is True
    number_format.multiplies_bfloat16.cache_clear()
