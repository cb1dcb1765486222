"""Capture one layer at a time gives the statistics of plain capture, for every family, and holds one layer in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run, save_tiny
from family_configs import family_config
from mixture_models import mixture_config, save_mixture
from test_distributed import assert_equal

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data import contrast
from steer2edit.data.behavior import Behavior
from steer2edit.errors import Steer2EditError
from steer2edit.methods import make_plan
from steer2edit.runtime.by_layer import opened_by_layer
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import Runtime, load_model

EXAMPLES = [
    contrast.Example(row["prompt"], row[label], label, "test", index)
    for index, row in enumerate(ROWS)
    for label in contrast.LABELS
]
# layers that differ, windows, shared keys, masks without positions, tuples as answers, norms after, projections around
DENSE = ["gemma2", "gemma3_text", "gemma4_text", "gpt2", "gpt_neo", "bloom", "mpt", "opt", "falcon", "phi3"]


def by_layer(folder: Path, scratch: Path, **settings: Any) -> Any:
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    with opened_by_layer(checkpoint, spec, Runtime(), scratch) as layers:
        return capture_statistics(
            layers.loaded, checkpoint, Behavior("rows", EXAMPLES), batch_tokens=512, layers=layers, **settings
        )


def plainly(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    loaded = load_model(checkpoint, read_spec(checkpoint))
    return capture_statistics(loaded, checkpoint, Behavior("rows", EXAMPLES), batch_tokens=512)


@pytest.mark.parametrize("model_type", DENSE)
def test_statistics_are_those_of_plain_capture(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family_config(model_type))
    scratch = tmp_path / "scratch"
    assert_equal(by_layer(folder, scratch), plainly(folder))
    assert not any(scratch.iterdir())


def test_every_weight_is_read_once(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils.offload import OffloadedWeightsLoader

    asked: list[str] = []
    plain = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda self, key: (asked.append(key), plain(self, key))[1]
    )
    by_layer(tiny_llama, tmp_path)
    names = [name for name in open_checkpoint(tiny_llama).tensors if ".layers." in name]
    assert sorted(asked) == sorted(names)


def test_on_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--data", tmp_path / "rows.jsonl", "--batch-tokens", 512]
    one, two = tmp_path / "one.stats.safetensors", tmp_path / "two.stats.safetensors"
    assert run("capture", tiny_llama, *options, "-o", one).exit_code == 0
    result = run("capture", tiny_llama, *options, "-o", two, "--by-layer", "--scratch", tmp_path / "scratch")
    assert result.exit_code == 0, result.stderr
    assert_equal(Statistics.load(one), Statistics.load(two))
    three = tmp_path / "three.stats.safetensors"
    result = run("capture", tiny_llama, *options, "-o", three, "--by-layer", "--device-map", "auto")
    assert result.exit_code == 2 and "leave --device-map out" in result.stderr


def test_layers_that_share_their_weights_are_refused(tmp_path: Path) -> None:
    # the second layer's matrix is the first's: with that one gone from memory there is nothing to run
    folder = save_tiny(tmp_path / "model", family_config("llama"))
    checkpoint = open_checkpoint(folder)
    with opened_by_layer(checkpoint, read_spec(checkpoint), Runtime(), tmp_path) as layers:
        layers._shelf[1].remove(next(entry for entry in layers._shelf[1] if entry[1] == "weight"))
        with pytest.raises(Steer2EditError, match="shares"), layers.resident(1):
            pass


DISK = {
    **{"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
    **{f"model.layers.{layer}": "cpu" if layer == 1 else "disk" for layer in range(3)},
}


def test_capture_and_edits_work_on_a_model_spread_over_memory_and_disk(
    tiny_llama: Path, statistics_of: Any, scoring: Any, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    spec = read_spec(checkpoint)
    runtime = Runtime(dtype="float32", device_map=DISK, offload_folder=str(tmp_path))
    spread, whole = load_model(checkpoint, spec, runtime), load_model(checkpoint, spec)
    assert {p.device.type for p in spread.model.parameters()} == {"cpu", "meta"} and spread.device.type == "cpu"
    behavior = Behavior("rows", EXAMPLES)
    assert_equal(
        capture_statistics(spread, checkpoint, behavior, batch_tokens=512),
        capture_statistics(whole, checkpoint, behavior, batch_tokens=512),
    )
    plan = make_plan(scoring)
    ids = torch.tensor([[5, 9, 13, 40]])
    with torch.inference_mode(), edited(spread, plan, 3.0), edited(whole, plan, 3.0):
        torch.testing.assert_close(spread.model(ids).logits, whole.model(ids).logits)


def test_experts_on_the_disk_are_seen_by_layer_only(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "model", mixture_config("qwen3_moe"))
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    places = {name: "disk" if "layers" in name else "cpu" for name in DISK}
    loaded = load_model(
        checkpoint, spec, Runtime(dtype="float32", device_map=places, offload_folder=str(tmp_path / "w"))
    )
    with pytest.raises(Steer2EditError, match="--by-layer"):
        capture_statistics(loaded, checkpoint, Behavior("rows", EXAMPLES))
    assert_equal(by_layer(folder, tmp_path / "scratch"), plainly(folder))
