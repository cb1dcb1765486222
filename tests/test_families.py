"""Every family, on a tiny random model: its writers are all found, and they are all there is to the residual stream."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, save_tiny
from family_configs import COMMON_SETTINGS, LINEAR, family_config
from releases import config_class

from steer2edit.architecture import MatrixRole, ModelSpec, Site, read_spec
from steer2edit.architecture.families import FAMILIES, MULTIMODAL
from steer2edit.architecture.refusals import REFUSED
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import TOLERANCE
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.errors import TargetError
from steer2edit.methods import make_plan
from steer2edit.plan import Bias, EditPlan
from steer2edit.runtime.model import LoadedModel, load_weights
from steer2edit.scoring.scores import Scoring
from steer2edit.targets.lora import NO_ADAPTER

CAUSAL = [name for family in FAMILIES for name in family.model_types if "_vl" not in name and name != "glm4v_text"]
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN = {"depth": 1, "num_heads": 2, "patch_size": 8}
_VIT = {**_QWEN, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
_CLIP, _SIGLIP = ({**VISION, "model_type": name} for name in ("clip_vision_model", "siglip_vision_model"))
# multimodal wrappers: what their text and vision configs need
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aya_vision": ({"model_type": "cohere2"}, _SIGLIP),
    "deepseek_vl": ({"model_type": "llama"}, _SIGLIP),
    "exaone4_5": ({"model_type": "exaone4"}, _VIT),
    "glm4v": (_MROPE, _VIT),
    "got_ocr2": ({"model_type": "qwen2"}, {**VISION, "mlp_dim": 16, "output_channels": 16}),
    "idefics3": ({"model_type": "llama"}, VISION),
    "internvl": ({"model_type": "qwen2"}, {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
    ),
    "lighton_ocr": ({"model_type": "qwen3"}, {**VISION, "model_type": "pixtral"}),
    "llava": ({"model_type": "llama"}, _CLIP),
    "llava_next": ({"model_type": "mistral"}, _CLIP),
    "llava_onevision": ({"model_type": "qwen2"}, _SIGLIP),
    "mistral3": ({"model_type": "mistral"}, {**VISION, "model_type": "pixtral"}),
    "paligemma": ({"model_type": "gemma"}, _SIGLIP),
    "qwen2_vl": (_MROPE, {**_QWEN, "embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": (_MROPE, _VIT),
    "qwen3_5": ({**_MROPE, **LINEAR}, _VIT),
    "qwen3_vl": (_MROPE, {**_VIT, "deepstack_visual_indexes": [0]}),
    "smolvlm": ({"model_type": "llama"}, VISION),
    "video_llava": ({"model_type": "llama"}, _CLIP),
    "vipllava": ({"model_type": "llama"}, _CLIP),
}
# what writes to the residual stream in the two blocks of a hybrid, and of a model without attention
_HYBRID = (("mixer_out", "mlp_out"), ("attn_out", "mlp_out"))
BLOCKS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("bamba", "lfm2", "lfm3", "olmo_hybrid", "qwen3_5_text", "recurrent_gemma"), _HYBRID),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), (("mixer_out",),) * 2),
    "falcon_h1": (("mixer_out", "attn_out", "mlp_out"),) * 2,
    "xlstm": (("mixer_out", "mlp_out"),) * 2,
}
# same length, same last token
CONTEXTS = torch.tensor([[1, 5, 9, 44, 7, 20], [1, 60, 33, 12, 51, 20]])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # products this small cost less than waking a second thread
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """A tiny model on disk, as the compiler sees it."""

    def __init__(self, folder: Path, statistics_of: Callable[..., Any]) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.spec: ModelSpec = read_spec(self.checkpoint)
        self._statistics_of = statistics_of
        self._statistics: Any = None

    def plan(self, method: str) -> EditPlan:
        if self._statistics is None:
            self._statistics = self._statistics_of(self.folder)
        return make_plan(Scoring(self.checkpoint, self.spec, self._statistics), method=method)

    def loaded(self, folder: Path | None = None) -> LoadedModel:
        return LoadedModel(load_weights(folder or self.folder), None, self.spec)

    def matrix(self, site: Site) -> torch.Tensor:
        stored = self.checkpoint.read(site.tensor)
        return stored if site.orientation == "out_in" else stored.T


def wrapper(folder: Path, model_type: str) -> Path:
    """A multimodal wrapper around a tiny language model."""
    from transformers import AutoModelForImageTextToText

    text, vision = WRAPPED[model_type]
    text = {**COMMON_SETTINGS, **text}
    torch.manual_seed(0)
    config = config_class(model_type)(text_config=text, vision_config=vision, tie_word_embeddings=False)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def qwen2_vl_flat(folder: Path) -> Path:
    """The language model's settings beside ``vision_config``, as Qwen2-VL was published."""
    path = wrapper(folder, "qwen2_vl") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config.pop("text_config"), **config}))
    return folder


def gemma3(folder: Path) -> Path:
    """The multimodal wrapper, as transformers saves it: ``language_model.model.layers``."""
    from transformers import Gemma3Config

    text = family_config("gemma3_text", rope_parameters=None).to_dict()
    return save_tiny(folder, Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4))


def gemma3_nested(folder: Path) -> Path:
    """The same with the module's names on disk: ``model.language_model.layers``."""
    return renamed(gemma3(folder), lambda name: name.replace("language_model.model.", "model.language_model."))


def gpt2_bare(folder: Path) -> Path:
    """gpt2 as on the Hub: saved from the model without its head, so without ``transformer.``."""
    return renamed(save_tiny(folder, family_config("gpt2")), lambda name: name.removeprefix("transformer."))


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: save_tiny(folder, family_config(name)) for name in CAUSAL},  # type: ignore[misc]
    "gemma3": gemma3,
    "gemma3-nested": gemma3_nested,
    "gpt2-bare": gpt2_bare,
}


WRAPPERS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: wrapper(folder, name) for name in WRAPPED},  # type: ignore[misc]
    "qwen2_vl-flat": qwen2_vl_flat,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Callable[[str], Case]:
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: Case((LAYOUTS | WRAPPERS)[name](root / name), statistics_of))


@pytest.fixture(params=[*LAYOUTS, *WRAPPERS])
def case(request: pytest.FixtureRequest, build: Callable[[str], Case]) -> Case:
    return build(request.param)


def blocks(loaded: LoadedModel) -> list[Any]:
    return [loaded.model.get_submodule(f"{loaded.spec.block_modules}{i}") for i in range(loaded.spec.layers)]


def last_logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(input_ids=CONTEXTS, use_cache=False).logits[:, -1]


def test_each_layer_has_two_writers_and_every_site_is_its_module(case: Case) -> None:
    loaded, spec = case.loaded(), case.spec
    roles = BLOCKS.get(spec.model_type, (("attn_out", "mlp_out"),) * 2)
    assert [site.key for site in spec.sites] == [f"{role}.{i}" for i, block in enumerate(roles) for role in block]
    for site in spec.sites:
        module, W = loaded.module(site), case.matrix(site)
        assert W.shape == (site.out_features, site.in_features)
        assert torch.equal(module.weight, case.checkpoint.read(site.tensor))
        assert (site.bias is None) == (module.bias is None)
        x = torch.randn(3, site.in_features)
        b = 0 if site.bias is None else case.checkpoint.read(site.bias)
        assert torch.allclose(module(x), x @ W.T + b, atol=1e-5)
    assert [site.heads for site in spec.sites] == [4 if s.role is MatrixRole.ATTN_OUT else None for s in spec.sites]
    assert loaded.module(spec.embedding) is loaded.model.get_input_embeddings()
    assert torch.equal(loaded.module(spec.embedding).weight, case.checkpoint.read(spec.embedding.tensor))


def test_without_its_writers_a_model_knows_no_context(case: Case) -> None:
    loaded = case.loaded()
    before = last_logits(loaded)
    assert (before[0] - before[1]).abs().max() > 1e-3
    writers = [loaded.module(site) for site in case.spec.sites]
    for parameter in (p for module in writers for p in module.parameters()):
        parameter.zero_()
    silent = last_logits(loaded)
    assert torch.equal(silent[0], silent[1])

    ours = {id(p) for module in writers for p in module.parameters()}
    others = [p for block in blocks(loaded) for p in block.parameters() if p.ndim >= 2 and id(p) not in ours]
    assert others
    for parameter in others:
        parameter.normal_()
    assert torch.equal(last_logits(loaded), silent)


@pytest.mark.parametrize(
    ("case", "method"),
    [*itertools.product(LAYOUTS, ["component", "ablation"]), *((name, "component") for name in WRAPPERS)],
    indirect=["case"],
)
def test_plans_become_checkpoints_and_adapters_that_verify(case: Case, method: str, tmp_path: Path) -> None:
    plan = case.plan(method)
    assert plan.edits
    carries_biases = any(isinstance(edit, Bias) for edit in plan.edits)
    assert carries_biases == (method == "ablation" and any(site.bias for site in case.spec.sites))
    no_adapter = carries_biases or case.spec.model_type in NO_ADAPTER
    if no_adapter:
        with pytest.raises(TargetError, match="a bias" if carries_biases else "Mamba"):
            emit(plan, case.checkpoint, case.spec, "lora", tmp_path / "lora")
    for target in ["checkpoint"] if no_adapter else ["checkpoint", "lora"]:
        emit(plan, case.checkpoint, case.spec, target, tmp_path / target)
        result = verify(tmp_path / target, base=case.folder)
        assert result.ok, result.problems
        assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]


@pytest.mark.parametrize("case", LAYOUTS, indirect=True)
def test_after_ablation_no_block_writes_along_the_direction(case: Case, tmp_path: Path) -> None:
    plan = case.plan("ablation")
    emit(plan, case.checkpoint, case.spec, "checkpoint", tmp_path / "out")
    r = case._statistics.difference(f"residual.{plan.method['direction_layer']}").float()
    r_hat = r / r.norm()
    for before, after in zip(writes(case.loaded()), writes(case.loaded(tmp_path / "out")), strict=True):
        assert (before @ r_hat).abs().max() > 1e-2 * before.norm(dim=-1).max()
        assert (after @ r_hat).abs().max() < 1e-5 * after.norm(dim=-1).max()


def writes(loaded: LoadedModel) -> Iterator[torch.Tensor]:
    """What each block adds to the residual stream."""
    found = []

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output) - inputs[0])

    with ExitStack() as stack:
        for block in blocks(loaded):
            stack.callback(block.register_forward_hook(hook).remove)
        last_logits(loaded)
    return iter(found)


def test_the_multimodal_models_are_those_that_are_named() -> None:
    assert {*WRAPPED, "gemma3"} == set(MULTIMODAL)


def test_a_model_type_is_described_once() -> None:
    known = [*REFUSED, *(name for family in FAMILIES for name in family.model_types)]
    assert len(set(known)) == len(known)
