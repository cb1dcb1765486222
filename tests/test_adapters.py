"""A stranger's adapter leaves the base as it was, bit by bit, whatever PEFT does to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import CheckpointError, Steer2EditError
from steer2edit.evaluation.candidates import Candidate, open_candidate
from steer2edit.evaluation.evaluate import evaluate
from steer2edit.evaluation.metrics import Neutral
from steer2edit.notices import collected
from steer2edit.runtime.adapters import adapted, changed, checksums
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.strength.kl import NeutralText

TEXT = "the old cat sees a small bird and the river runs . " * 12
IDS = torch.arange(4, 40)[None]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["norm"]},
}
REWRITING = ("pissa", "olora")


@pytest.fixture(scope="module")
def own(tiny_llama: Path) -> LoadedModel:
    checkpoint = open_checkpoint(tiny_llama)
    return load_model(checkpoint, read_spec(checkpoint))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
        return found.clone()


def trained(folder: Path, out: Path, settings: dict[str, Any]) -> torch.Tensor:
    """A real adapter of PEFT at ``out``, a step away from its initialisation, and the logits of the model it was trained on."""
    from peft import LoraConfig, get_peft_model

    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, read_spec(checkpoint)).model
    eva = settings.get("init_lora_weights") == "eva"
    adapter = get_peft_model(
        model, LoraConfig(r=4, target_modules=["o_proj", "down_proj"], **({} if eva else settings))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapter.eval().save_pretrained(out)
    if eva:  # its initialisation needs data, and only chooses the factors
        reconfigured(out, init_lora_weights="eva", eva_config={})
    return logits(adapter)


def reconfigured(adapter: Path, **changes: Any) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_model_that_was_trained_and_leaves_the_base(
    tiny_llama: Path, own: LoadedModel, tmp_path: Path, kind: str
) -> None:
    expected = trained(tiny_llama, tmp_path / "adapter", KINDS[kind])
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    sums, base = checksums(own.model), logits(own.model)
    for _ in range(2):
        with collected() as said, adapted(own.model, tmp_path / "adapter"):
            assert torch.allclose(logits(own.model), expected, atol=1e-5)
        assert any("on copies" in text for text in said) is (kind in REWRITING)
        after = own.model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert not changed(own.model, sums) and torch.equal(logits(own.model), base)
    assert float((expected - base).abs().max()) > 1e-3


def test_candidates_after_a_rewriting_adapter_are_measured_on_the_base(
    tiny_llama: Path, own: LoadedModel, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    for kind in ("plain", "pissa"):
        trained(tiny_llama, tmp_path / kind, KINDS[kind])
    tasks = [Neutral(NeutralText(own, TEXT))]
    alone = evaluate(own, tasks, [open_candidate(own, checkpoint, str(tmp_path / "plain"))])
    first = [open_candidate(own, checkpoint, str(tmp_path / name)) for name in ("pissa", "plain")]
    after = evaluate(own, tasks, first)
    assert after.rows[2].samples == alone.rows[1].samples and after.rows[1].samples != alone.rows[1].samples


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "corda_ipm"])
def test_a_base_that_cannot_be_made_again_is_refused(
    tiny_llama: Path, own: LoadedModel, tmp_path: Path, kind: str
) -> None:
    trained(tiny_llama, tmp_path / "adapter", {})
    reconfigured(tmp_path / "adapter", init_lora_weights=kind)
    before = checksums(own.model)
    with pytest.raises(CheckpointError, match="converted form"), adapted(own.model, tmp_path / "adapter"):
        pass
    assert not changed(own.model, before)


def test_a_quantising_initialisation_loads_or_is_refused_and_leaves_the_base(
    tiny_llama: Path, own: LoadedModel, tmp_path: Path
) -> None:
    """LoftQ needs a package that PEFT does not bring."""
    trained(tiny_llama, tmp_path / "adapter", {})
    reconfigured(tmp_path / "adapter", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    before = checksums(own.model)
    refused: AbstractContextManager[Any] = (
        nullcontext() if find_spec("scipy") else pytest.raises(CheckpointError, match="scipy")
    )
    with refused, adapted(own.model, tmp_path / "adapter"):
        assert changed(own.model, before)
    assert not changed(own.model, before)


def test_a_prompt_is_no_edit(tiny_llama: Path, own: LoadedModel, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    checkpoint = open_checkpoint(tiny_llama)
    model = load_model(checkpoint, read_spec(checkpoint)).model
    tuned = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    tuned.save_pretrained(tmp_path / "adapter")
    before = checksums(own.model)
    with pytest.raises(CheckpointError, match="adapts the prompt"), adapted(own.model, tmp_path / "adapter"):
        pass
    assert not changed(own.model, before)


def test_an_adapter_that_does_not_fit_leaves_the_base(tiny_llama: Path, own: LoadedModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained(tiny_llama, tmp_path / "adapter", KINDS["pissa"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor[:, :3].contiguous() for name, tensor in load_file(file).items()}, file)
    before, names = checksums(own.model), [name for name, _ in own.model.named_modules()]
    with pytest.raises(CheckpointError, match="PEFT cannot load"), adapted(own.model, tmp_path / "adapter"):
        pass
    assert not changed(own.model, before) and [name for name, _ in own.model.named_modules()] == names


def test_a_candidate_that_changes_the_base_ends_the_evaluation(own: LoadedModel) -> None:
    weight = own.model.get_submodule("model.layers.0.self_attn.o_proj").weight

    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        weight.data[0, 0] += 1e-3
        yield own

    kept = weight.data.clone()
    try:
        with pytest.raises(
            Steer2EditError, match=r"candidate careless changed the base's weights(.|\n)*0.self_attn.o_proj"
        ):
            evaluate(own, [Neutral(NeutralText(own, TEXT))], [Candidate("careless", enter)])
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_a_checksum_sees_any_bit(dtype: torch.dtype) -> None:
    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", (torch.arange(27) % 2).to(dtype))

    model = One()
    before = checksums(model)
    assert not changed(model, before)
    raw = model.get_buffer("x").view(torch.uint8)
    for place in (0, len(raw) // 2, len(raw) - 1):
        raw[place] ^= 1
        assert changed(model, before) == ["x"]
        raw[place] ^= 1
    assert not changed(model, before)
