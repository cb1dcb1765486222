"""The 4-bit and 8-bit formats of ``benchmarks/weight_formats.py`` round to nearest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import weight_formats as formats


@pytest.mark.parametrize(
    ("name", "steps", "farthest"),
    [
        ("int4_symmetric", 15, 0.51),
        # the zero point is whole, so that a group's ends may have no level
        ("int4_asymmetric", 15, 1.01),
        ("int8_rows", 254, 0.51),
    ],
)
def test_a_number_becomes_a_level_near_it(name: str, steps: int, farthest: float) -> None:
    # the last group is smaller; one group is zero
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    weight[0, :128] = 0
    stored = getattr(formats, name)(weight)
    width = weight.shape[1] if name == "int8_rows" else formats.GROUP
    for before, after in zip(torch.split(weight, width, 1), torch.split(stored, width, 1), strict=True):
        step = 2 * before.abs().amax(1, keepdim=True) / steps
        assert bool(((after - before).abs() <= farthest * step).all())
        assert 2 < max(len(row.unique()) for row in after) <= steps + 1
    assert torch.equal(stored[0, :128], weight[0, :128])


def test_embedding_and_unembedding_stay_in_formats_of_linear_layers() -> None:
    from conftest import llama_config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(llama_config())
    names = set(formats.of_linear(formats.int8_rows)(model, Path(), Path()))
    assert {name for name, one in model.named_parameters() if one.dim() == 2} - names == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
