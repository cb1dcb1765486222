"""On another device no work waits for a transfer at every site, and no operation mixes devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import family_config
from second_device import SecondDevice

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.tokens import Encoded
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.unembedding import Affine

FAMILIES = ("llama", "gemma3_text", "gpt2")


@pytest.fixture(autouse=True)
def device_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on the meta device stand for offloaded ones elsewhere in the program."""
    for module in ("runtime.model", "runtime.hooks"):
        monkeypatch.setattr(f"steer2edit.{module}.device_of", lambda module: next(module.parameters()).device)


def moved(family: str, folder: Any) -> LoadedModel:
    """A tiny model on the second device."""
    checkpoint = open_checkpoint(save_tiny(folder / family, family_config(family)))
    loaded = load_model(checkpoint, read_spec(checkpoint))
    loaded.model.to(SecondDevice.name)
    return loaded


def examples(count: int, length: int = 12) -> list[Encoded]:
    rows = []
    for row in range(count):
        ids = tuple(3 + (7 * row + 5 * at) % 90 for at in range(length + row % 3))
        rows += [Encoded(ids, 4, "positive", row), Encoded(ids[::-1], 4, "negative", row)]
    return [*rows, Encoded(tuple(range(3, 33)), 1, "background", 0), Encoded(tuple(range(9, 39)), 6, "chat", 0)]


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path: Any) -> LoadedModel:
    return moved(request.param, tmp_path)


def plan_for(loaded: LoadedModel) -> EditPlan:
    """An edit of rank 1 at every writer, its factors on the CPU."""
    edits = [
        LowRank(site.matrix, torch.ones(site.out_features, 1), torch.ones(1, site.in_features))
        for site in loaded.spec.sites
    ]
    return EditPlan(Base("tiny", None, "0"), tuple(edits), {})


def test_capture_waits_for_no_site_and_no_batch(loaded: LoadedModel) -> None:
    with SecondDevice() as watched:
        capture(loaded, examples(24), batch_tokens=128)
    # the sums are fetched once, at the end
    once = watched.waits.pop("capture/accumulator.py:<dictcomp>")
    assert once > 0 and not watched.waits, watched.waits
    with SecondDevice() as again:
        capture(loaded, examples(6), batch_tokens=128)
    assert again.waits["capture/accumulator.py:<dictcomp>"] == once


def test_kl_waits_once_a_pass(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    head = loaded.model.get_output_embeddings()
    monkeypatch.setattr("steer2edit.strength.kl.affine", lambda *_: Affine(head.weight, head.bias, 1.0))
    with SecondDevice() as watched:
        text = NeutralText(loaded, "the cat sees a bird and the river runs " * 90, window=32, batch_tokens=128)
        watched.waits.clear()
        with edited(loaded, plan_for(loaded), 0.5):
            text.measure()
        vectors = {site.key: torch.ones(site.out_features) for site in loaded.spec.sites}
        with steered(loaded, vectors, 0.5):
            text.measure()
    assert watched.waits == {"strength/kl.py:_summed": 2}


def test_the_mode_sees_a_mix_of_devices_and_a_wait() -> None:
    there = torch.ones(3, device=SecondDevice.name)
    with SecondDevice() as watched:
        with pytest.raises(RuntimeError, match="both devices"):
            there + torch.ones(3)
        there + torch.tensor(2.0)
        assert LowRank("w", there[:, None], there[None]).norm == 0
    assert watched.waits == {"plan/operations.py:norm": 1}
