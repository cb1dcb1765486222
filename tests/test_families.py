"""Every family, on a tiny random model: its writers are all found, and they are all there is to the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import INSIDE, family_config
from family_models import Case, blocks, last_logits, renamed
from reader_laws import check_readers, single_readers

from steer2edit.architecture import MatrixRole
from steer2edit.architecture.families import FAMILIES
from steer2edit.architecture.refusals import REFUSED
from steer2edit.architecture.stream import block_scale
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import TOLERANCE
from steer2edit.artefact.verify import verify
from steer2edit.errors import TargetError
from steer2edit.plan import Bias
from steer2edit.runtime.model import LoadedModel
from steer2edit.targets.lora import NO_ADAPTER

# a mixture whose small models are dense
DENSE_TOO = ("gemma4_text",)
CAUSAL = [
    *(name for family in FAMILIES for name in family.model_types if name not in INSIDE),
    *DENSE_TOO,
]
# what writes to the residual stream in the two blocks of a hybrid, and of a model without attention
_HYBRID = (("mixer_out", "mlp_out"), ("attn_out", "mlp_out"))
BLOCKS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("bamba", "lfm2", "lfm3", "olmo_hybrid", "qwen3_5_text", "recurrent_gemma"), _HYBRID),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), (("mixer_out",),) * 2),
    "falcon_h1": (("mixer_out", "attn_out", "mlp_out"),) * 2,
    "xlstm": (("mixer_out", "mlp_out"),) * 2,
    "gemma4_text": (("attn_out", "mlp_out", "per_layer_out"),) * 4,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # products this small cost less than waking a second thread
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt2_bare(folder: Path) -> Path:
    """gpt2 as on the Hub: saved from the model without its head, so without ``transformer.``."""
    return renamed(save_tiny(folder, family_config("gpt2")), lambda name: name.removeprefix("transformer."))


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: save_tiny(folder, family_config(name)) for name in CAUSAL},  # type: ignore[misc]
    "gpt2-bare": gpt2_bare,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Callable[[str], Case]:
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: Case(LAYOUTS[name](root / name), statistics_of))


@pytest.fixture(params=list(LAYOUTS))
def case(request: pytest.FixtureRequest, build: Callable[[str], Case]) -> Case:
    return build(request.param)


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


def test_readers_are_all_that_reads_the_stream(case: Case) -> None:
    check_readers(case.checkpoint, case.loaded())


@pytest.mark.parametrize("method", ["component", "ablation"])
def test_plans_become_checkpoints_and_adapters_that_verify(case: Case, method: str, tmp_path: Path) -> None:
    plan = case.plan(method)
    assert plan.edits
    if method == "component":
        plan = replace(plan, edits=(*plan.edits, *single_readers(case.checkpoint, case.spec)))
    carries_biases = any(isinstance(edit, Bias) for edit in plan.edits)
    assert carries_biases == (method == "ablation" and any(site.bias for site in case.spec.sites))
    no_adapter = case.spec.model_type in NO_ADAPTER
    if no_adapter:
        with pytest.raises(TargetError, match="Mamba"):
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
    loaded, ablated = case.loaded(), case.loaded(tmp_path / "out")
    for before, after in zip(writes(case, loaded), writes(case, ablated), strict=True):
        assert (before @ r_hat).abs().max() > 1e-2 * before.norm(dim=-1).max()
        assert (after @ r_hat).abs().max() < 1e-5 * after.norm(dim=-1).max()


def writes(case: Case, loaded: LoadedModel) -> Iterator[torch.Tensor]:
    """What each block adds to the residual stream, before it multiplies the stream by a factor, if it has one."""
    found: list[torch.Tensor] = []

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        scale = block_scale(case.checkpoint, case.spec, len(found))
        found.append((output[0] if isinstance(output, tuple) else output) / scale - inputs[0])

    with ExitStack() as stack:
        for block in blocks(loaded):
            stack.callback(block.register_forward_hook(hook).remove)
        last_logits(loaded)
    return iter(found)


def test_a_model_type_is_described_once() -> None:
    known = [*REFUSED, *(name for family in FAMILIES for name in family.model_types)]
    assert len(set(known)) == len(known)
