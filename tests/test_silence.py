"""Silenced components: their names, the model with a head's input at zero, and the mean that may stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, run, save_tiny
from family_configs import family_config
from family_models import CONTEXTS, Case
from mixture_models import MODELS

from steer2edit.architecture.components import component_name, read_components, site_name
from steer2edit.artefact.emit import emit
from steer2edit.artefact.verify import verify
from steer2edit.errors import ArchitectureError, PlanError
from steer2edit.files.layout import PLAN
from steer2edit.methods import make_plan, silence
from steer2edit.plan import EditPlan
from steer2edit.runtime.hooks import edited
from steer2edit.scoring.scores import Scoring

Build = Callable[[str], Case]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Build:
    @functools.cache
    def make(family: str) -> Case:
        folder = tmp_path_factory.mktemp("silence") / family
        if family == "mixtral":
            MODELS[family](folder)
        else:
            save_tiny(folder, llama_config() if family == "llama" else family_config(family))
        return Case(folder, statistics_of)

    return make


def scoring(case: Case) -> Scoring:
    case.plan("ablation")  # captures
    return Scoring(case.checkpoint, case.spec, case._statistics)


def logits(case: Case, folder: Path | None = None, change: Any = None) -> torch.Tensor:
    loaded = case.loaded(folder)
    with torch.inference_mode(), change(loaded) if change else nullcontext():
        return loaded.model(input_ids=CONTEXTS, use_cache=False).logits  # type: ignore[no-any-return]


def inputs_replaced(case: Case, values: dict[str, tuple[slice, torch.Tensor | float]]) -> Any:
    """The model with some input columns of a module at other values: ablation as papers do it."""

    @contextmanager
    def change(loaded: Any) -> Iterator[None]:
        handles = []
        for key, (columns, value) in values.items():

            def hook(_module: Any, args: Any, columns: slice = columns, value: Any = value) -> Any:
                x = args[0].clone()
                x[..., columns] = value
                return (x, *args[1:])

            handles.append(loaded.module(case.spec.site(key)).register_forward_pre_hook(hook))
        yield
        for handle in handles:
            handle.remove()

    return change


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_silenced_head_is_the_head_with_a_zero_input(build: Build, family: str, tmp_path: Path) -> None:
    case = build(family)
    width = case.spec.site("attn_out.1").in_features // 4
    options = silence.Options(components="attn.1.h2, mlp.0.n5-7")
    plan = make_plan(scoring(case), method="silence", options=options)
    zero = {"attn_out.1": (slice(2 * width, 3 * width), 0.0), "mlp_out.0": (slice(5, 8), 0.0)}
    expected = logits(case, change=inputs_replaced(case, zero))  # type: ignore[arg-type]
    assert (expected - logits(case)).abs().max() > 1e-3
    assert torch.allclose(logits(case, change=lambda loaded: edited(loaded, plan)), expected, atol=1e-5)
    emit(plan, case.checkpoint, case.spec, "checkpoint", tmp_path / "out")
    assert torch.allclose(logits(case, tmp_path / "out"), expected, atol=1e-5)
    if family != "gpt2":
        emit(plan, case.checkpoint, case.spec, "lora", tmp_path / "lora")
    assert plan.method["silenced"] == ["mlp.0.n5-7", "attn.1.h2"]


def test_a_mean_that_is_left_is_the_head_with_its_mean_input(build: Build) -> None:
    case = build("gpt2")
    one = scoring(case)
    plan = make_plan(one, method="silence", options=silence.Options(components="attn.1.h2", leave="mean"))
    columns = slice(16, 24)
    mean = one.statistics.x_bar("attn_out.1")[columns].float()
    expected = logits(case, change=inputs_replaced(case, {"attn_out.1": (columns, mean)}))
    assert torch.allclose(logits(case, change=lambda loaded: edited(loaded, plan)), expected, atol=1e-5)
    with pytest.raises(PlanError, match=r"attn_out\.1: it has no bias, and no setting"):
        make_plan(
            scoring(build("mistral")), method="silence", options=silence.Options(components="attn.1.h2", leave="mean")
        )


def test_the_mean_of_a_writer_without_a_bias_is_a_new_one(build: Build, tmp_path: Path) -> None:
    case = build("llama")
    one = scoring(case)
    plan = make_plan(one, method="silence", options=silence.Options(components="attn.1.h2", leave="mean"))
    columns = slice(32, 48)
    mean = one.statistics.x_bar("attn_out.1")[columns].float()
    expected = logits(case, change=inputs_replaced(case, {"attn_out.1": (columns, mean)}))
    emit(plan, case.checkpoint, case.spec, "checkpoint", tmp_path / "out")
    assert torch.allclose(logits(case, tmp_path / "out"), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_silenced_layer_writes_nothing(build: Build, family: str, tmp_path: Path) -> None:
    case = build(family)
    options = silence.Options(components="layer.1")
    plan = make_plan(scoring(case), method="silence", options=options)
    emit(plan, case.checkpoint, case.spec, "checkpoint", tmp_path / "out")

    @contextmanager
    def skipped(loaded: Any) -> Iterator[None]:
        def hook(_module: Any, args: Any, output: Any) -> Any:
            return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

        block = loaded.model.get_submodule(f"{case.spec.block_modules}1")
        handle = block.register_forward_hook(hook)
        yield
        handle.remove()

    expected = logits(case, change=skipped)
    assert torch.allclose(logits(case, tmp_path / "out"), expected, atol=1e-5)
    assert plan.method["silenced"] == ["attn.1", "mlp.1"]


def test_an_experts_neuron_is_silenced(build: Build) -> None:
    case = build("mixtral")
    site = next(site for site in case.spec.sites if site.expert == 1)
    plan = make_plan(
        Scoring(case.checkpoint, case.spec, silence_statistics(case)),
        method="silence",
        options=silence.Options(components=f"expert.{site.layer}.1"),
    )
    with pytest.raises(ArchitectureError, match="an expert is named with its number"):
        read_components([f"expert.{site.layer}"], case.spec)
    changed = logits(case, change=lambda loaded: edited(loaded, plan))
    assert not torch.allclose(changed, logits(case), atol=1e-4)


def silence_statistics(case: Case) -> Any:
    from steer2edit.capture.statistics import Statistics

    return Statistics.nothing(case.checkpoint)


def test_the_strongest_are_those_of_the_scores(build: Build, tmp_path: Path) -> None:
    case = build("llama")
    one = scoring(case)
    component = make_plan(one, method="component")
    component.save(tmp_path / "component.plan.safetensors")
    sizes = {
        component_name(key, i): abs(float(g))
        for key, table in component.scores.items()
        for i, g in enumerate(table.g)
        if key.startswith("mlp_out")
    }
    expected = sorted(sizes, key=lambda name: -sizes[name])[:3]
    options = silence.Options(strongest=3, kind="neurons", stable=False)
    here = make_plan(one, method="silence", options=options)
    there = make_plan(
        Scoring(case.checkpoint, case.spec, silence_statistics(case)),
        method="silence",
        options=silence.Options(
            strongest=3, kind="neurons", stable=False, scores_from=str(tmp_path / "component.plan.safetensors")
        ),
    )
    silenced = [read_components(plan.method["silenced"], case.spec) for plan in (here, there)]
    assert silenced[0] == silenced[1] == read_components(expected, case.spec)
    toward = make_plan(one, method="silence", options=silence.Options(strongest=2, side="toward", stable=False))
    for key, table in toward.scores.items():
        assert all(table.g[i] > 0 for i in table.lam.nonzero()[:, 0]), key
    with pytest.raises(PlanError, match="qualify"):
        make_plan(one, method="silence", options=silence.Options(strongest=10_000))


def test_names_read_back_and_wrong_ones_are_all_named(build: Build) -> None:
    spec = build("llama").spec
    for site in spec.sites:
        for index in (0, site.components - 1):
            assert read_components([component_name(site.key, index)], spec) == {site.key: (index,)}
        assert read_components([site_name(site.key)], spec)[site.key] == tuple(range(site.components))
    wrong = ["attn.1.h9", "attn.9", "mlp.1.h3", "layer.1.h2", "heads", "router.1", "mlp.2.n9-3"]
    with pytest.raises(ArchitectureError) as error:
        read_components(wrong, spec)
    assert all(name in str(error.value) for name in wrong)


def test_a_mixer_has_channels_and_no_heads(tmp_path: Path) -> None:
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint

    spec = read_spec(open_checkpoint(save_tiny(tmp_path / "mamba2", family_config("mamba2"))))
    assert read_components(["mixer.1.c3"], spec) == {"mixer_out.1": (3,)}
    with pytest.raises(ArchitectureError, match="its components are channels"):
        read_components(["mixer.1.h0"], spec)


def test_the_command_needs_no_statistics_for_a_list(build: Build, tmp_path: Path) -> None:
    folder, out = build("llama").folder, tmp_path / "x.plan.safetensors"
    names = tmp_path / "names.txt"
    names.write_text("attn.0.h1  # a comment\nmlp.2.n4\n")
    run("plan", folder, "--method", "silence", "--components", names, "-o", out)
    assert EditPlan.load(out).method["silenced"] == ["attn.0.h1", "mlp.2.n4"]
    told = run("show", out).stdout
    assert "attn.0.h1, mlp.2.n4" in told and "16 of 64 columns × 0" in told
    refused = run("plan", folder, "--method", "silence", "-o", tmp_path / "y.plan.safetensors")
    assert refused.exit_code == 2 and "--stats" in refused.stderr
    compiled = tmp_path / "out"
    command = ("compile", folder, "--method", "silence", "--out", compiled)
    done = run(*command, "--components", names)
    assert done.exit_code == 0, done.stderr
    assert EditPlan.load(compiled / PLAN).edits[0].parts().keys() == EditPlan.load(out).edits[0].parts().keys()
    assert EditPlan.load(compiled / PLAN).method["silenced"] == ["attn.0.h1", "mlp.2.n4"]
    for flags, message in (
        (("--components", names, "--protect", "formal"), "--vectors, --vector and --protect change what is captured"),
        (("--components", names, "--eval", names), "--eval and --aim compare with steering"),
        ((), "give --data, --behavior"),
    ):
        refused = run(*command, *flags, "--force")
        assert refused.exit_code == 2 and message in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"components": "attn.1.h2", "side": "toward"}, "--side would change nothing: --components lists"),
        ({"components": "attn.1.h2", "layers": (1, 1)}, "--layers would change nothing"),
        ({"components": "attn.1.h2", "kind": "both"}, "--kind would change nothing"),
        ({"components": "attn.1.h2", "scores_from": "x"}, "--scores-from would change nothing"),
        ({"strongest": 1, "mean_of": "chat"}, "--mean-of would change nothing: it goes with --leave mean"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(build: Build, options: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        silence.plan(scoring(build("llama")), silence.Options(**options))


@pytest.mark.parametrize("to", ["lora", "gguf", "mlx"])
def test_an_adapter_of_a_silence_at_strength_0_changes_nothing(build: Build, tmp_path: Path, to: str) -> None:
    case = build("llama")
    plan = make_plan(scoring(case), method="silence", options=silence.Options(components="attn.1.h2")).scaled(0.0)
    emit(plan, case.checkpoint, case.spec, to, tmp_path / to)
    assert verify(tmp_path / to, base=case.folder).ok
