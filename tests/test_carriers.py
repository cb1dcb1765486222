"""Constants as biases that a checkpoint lacks: for every type that can carry one, the artefact is the base under a hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import INSIDE, family_config
from family_models import CONTEXTS
from mixture_models import MIXTURE_TYPES, mixture_config, save_mixture
from transformers import AutoModelForCausalLM
from wrapper_models import WRAPPERS

from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.architecture.carriers import CARRIERS
from steer2edit.architecture.constants import carrier, ends_block, why_no_bias, why_none
from steer2edit.architecture.find_family import KNOWN
from steer2edit.architecture.stream import factor
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.methods._biases import no_bias
from steer2edit.plan import Base, Bias, EditPlan, NewBias
from steer2edit.runtime.hooks import stream_shifted
from steer2edit.runtime.model import LoadedModel, load_weights

# a language model that transformers knows as a part alone: a multimodal model around it
AROUND = {
    "qwen3_vl_text": "qwen3_vl", "hunyuan_vl_text": "hunyuan_vl", "granite_docling_text": "granite_docling",
    "granite4_vision_text": "granite4_vision", "paddleocr_vl_text": "paddleocr_vl", "qwen3_omni_moe_text":
    "qwen3_omni_moe_thinker", "qwen3_vl_moe_text": "qwen3_vl_moe", "mistral_large4_text": "mistral_large4",
    "apertus1p5_text": "", "cohere_compass_text": "cohere_compass", "qwen3_5_text": "qwen3_5",
}  # fmt: skip


def build(folder: Path, model_type: str) -> Path:
    if model_type in INSIDE:
        return WRAPPERS[AROUND[model_type]](folder)
    if model_type in MIXTURE_TYPES:
        return save_mixture(folder, mixture_config(model_type))
    return save_tiny(folder, family_config(model_type))


def constants(checkpoint: Checkpoint, spec: ModelSpec) -> EditPlan:
    """A random constant at every writer that can carry one."""
    generator = torch.Generator().manual_seed(3)
    names = [site.new_bias for site in spec.sites if site.new_bias is not None]
    edits = (NewBias(name, 0.3 * torch.randn(spec.hidden_size, generator=generator)) for name in names)
    return EditPlan(Base.of(checkpoint), tuple(edits))


@contextmanager
def added(loaded: LoadedModel, plan: EditPlan) -> Iterator[None]:
    """Activation addition as everybody writes it: a hook on the module adds a vector to its output."""
    with ExitStack() as stack:
        for edit in plan.edits:
            module = loaded.module(loaded.spec.owners[edit.tensor])
            assert isinstance(edit, (Bias, NewBias))
            hook = lambda _module, _inputs, output, v=edit.delta: output + v  # noqa: E731
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = loaded.model(input_ids=CONTEXTS, use_cache=False).logits.float()
        return result


@pytest.mark.parametrize("model_type", CARRIERS)
def test_new_biases_are_activation_addition_and_nothing_else_changes(model_type: str, tmp_path: Path) -> None:
    base = build(tmp_path / "base", model_type)
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    assert spec.model_type == model_type
    plan = constants(checkpoint, spec)
    assert plan.edits
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    loaded = LoadedModel(load_weights(base), None, spec)
    with added(loaded, plan):
        hooked = logits(loaded)
    before = logits(loaded)
    edited = logits(LoadedModel(load_weights(tmp_path / "out"), None, spec))
    assert (edited - hooked).abs().max() <= 1e-5 * max(1, float(hooked.abs().max()))
    assert (before - hooked).abs().max() > 1e-2

    result = open_checkpoint(tmp_path / "out")
    for name, info in result.tensors.items():
        stored = result.read(info)
        edit = plan.edit_of(name)
        if name in checkpoint.tensors:
            assert torch.equal(stored, checkpoint.read(name))
        else:
            assert edit is None or isinstance(edit, (Bias, NewBias))
            assert torch.equal(stored, torch.zeros_like(stored) if edit is None else edit.delta)


@pytest.mark.parametrize("model_type", ["llama", "granite", "falcon", "cohere", "mamba"])
def test_a_constant_where_a_block_ends_is_a_vector_added_to_the_stream(model_type: str, tmp_path: Path) -> None:
    base = build(tmp_path / "base", model_type)
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    site = next(site for site in reversed(spec.sites) if site.layer == 0 and carrier(site) and ends_block(spec, site))
    v = 0.3 * torch.randn(spec.hidden_size, generator=torch.Generator().manual_seed(4))
    plan = EditPlan(Base.of(checkpoint), (NewBias(str(site.new_bias), v / factor(checkpoint, site)),))
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    loaded = LoadedModel(load_weights(base), None, spec)
    with stream_shifted(loaded, {0: v}):
        hooked = logits(loaded)
    edited = logits(LoadedModel(load_weights(tmp_path / "out"), None, spec))
    assert (edited - hooked).abs().max() <= 1e-5 * max(1, float(hooked.abs().max()))


def test_no_other_setting_gives_a_writer_a_bias() -> None:
    """Of the types without a carrier, or with one: asked of transformers, module by module."""
    missing = []
    for family in KNOWN:
        for model_type in family.model_types:
            if model_type in INSIDE:
                continue
            make = mixture_config if model_type in MIXTURE_TYPES else family_config
            config = make(model_type)
            known = {key for one in CARRIERS.get(model_type, ()) for key in one.keys}
            flags = [key for key, value in config.to_dict().items() if "bias" in key and value is False]
            for flag in flags if family.attn_norm is None or family.mlp_norm is None else ():
                if flag in known:
                    continue
                leaves = {family.module(leaf) for leaf in (family.attn_out, family.mlp_out, *family.mixers)}
                new = biased(make(model_type, **{flag: True}), leaves) - biased(config, leaves)
                missing += [f"{model_type}: {flag} gives {leaf} a bias" for leaf in new]
    assert not missing, "\n".join(missing)


def biased(config: Any, leaves: set[str]) -> set[str]:
    """Those of the modules that have a bias in some block."""
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    return {leaf for leaf in leaves if any(name.endswith(f".{leaf}.bias") for name in names)}


def test_why_a_writer_gets_no_bias_is_said_once(tmp_path: Path) -> None:
    reasons = {"mistral": "no setting of a mistral model gives it one", "gemma3_text": "in front of a norm"}
    for family, reason in reasons.items():
        spec = read_spec(open_checkpoint(save_tiny(tmp_path / family, family_config(family))))
        site = spec.site("mlp_out.0")
        assert reason in why_no_bias(spec, site) and no_bias(spec, site) == f"mlp_out.0: {why_no_bias(spec, site)}"
        assert (why_none(spec, site) == why_no_bias(spec, site)) == (site.norm is None)
