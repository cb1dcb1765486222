"""The formulas, each against its definition written out densely."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_tiny

from steer2edit import methods
from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.errors import CheckpointError, PlanError, Steer2EditError
from steer2edit.methods import ablation, component, make_plan, steering
from steer2edit.plan import LowRank
from steer2edit.scoring.scores import Scoring

Setup = tuple[Checkpoint, ModelSpec, Statistics]


@pytest.fixture(scope="module")
def setup(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Setup:
    checkpoint = open_checkpoint(tiny_llama)
    return checkpoint, read_spec(checkpoint), statistics_of(tiny_llama)


def test_component_edits_are_the_papers_written_out_by_components(setup: Setup) -> None:
    checkpoint, spec, statistics = setup
    rho, alpha = 0.3, 0.2
    options = component.Options(rho_attn=rho, rho_mlp=rho, alpha=alpha, scale="absolute", stable=False)
    plan = component.plan(Scoring(checkpoint, spec, statistics), options)
    assert plan.edits
    for site in spec.sites:
        W = checkpoint.read(site.tensor).double()
        v = statistics.difference(site.key)
        v_hat, x_bar = v / v.norm(), statistics.x_bar(site.key)
        expected = torch.zeros_like(W)
        for j in range(site.components):
            size = site.in_features // site.components
            block = slice(j * size, (j + 1) * size)
            y = W[:, block] @ x_bar[block]
            g = float(torch.cosine_similarity(v_hat, y, dim=0))
            lam = (1 if g > 0 else -1) * max(abs(g) - rho * alpha, 0) / (rho * (1 - alpha))
            k = W[:, block].T @ v_hat
            expected[:, block] = lam * torch.outer(v_hat, k / k.norm())
            assert float(plan.scores[site.key].g[j]) == pytest.approx(g, abs=1e-5)
            assert float(plan.scores[site.key].lam[j]) == pytest.approx(lam, abs=1e-4)
        edit = plan.edit_of(site.tensor)
        assert isinstance(edit, LowRank)
        assert torch.allclose(edit.dense().double(), expected, atol=1e-4)


def test_both_parametrisations_are_one(setup: Setup) -> None:
    rho, alpha = 0.35, 0.4
    tau, slope = rho * alpha, 1 / (rho * (1 - alpha))
    assert rho == pytest.approx(tau + 1 / slope)
    assert alpha == pytest.approx(tau * slope / (1 + tau * slope))
    one = component.plan(Scoring(*setup), component.Options(rho_attn=rho, rho_mlp=rho, alpha=alpha))
    two = component.plan(Scoring(*setup), component.Options(tau_attn=tau, tau_mlp=tau, slope=slope))
    assert all(torch.allclose(a.dense(), b.dense(), atol=1e-6) for a, b in zip(one.edits, two.edits, strict=True))  # type: ignore[union-attr]


def test_a_relative_edit_pushes_by_v_in_the_papers_proportions(setup: Setup) -> None:
    _, spec, statistics = setup
    rule = {"top_heads": 4, "top_neurons": 10}
    relative = component.plan(Scoring(*setup), component.Options(**rule))  # type: ignore[arg-type]
    absolute = component.plan(Scoring(*setup), component.Options(**rule, scale="absolute", stable=True))  # type: ignore[arg-type]
    for mine, papers in zip(relative.edits, absolute.edits, strict=True):
        site = next(site for site in spec.sites if site.tensor == mine.tensor)
        v = statistics.difference(site.key).float()
        assert torch.allclose(mine.dense() @ statistics.x_bar(site.key).float(), v, atol=1e-5)  # type: ignore[union-attr]
        cosine = torch.cosine_similarity(mine.A, papers.A)  # type: ignore[union-attr]
        assert float(cosine) == pytest.approx(1.0, abs=1e-5)


def test_the_mean_push_of_every_edit_is_along_v(setup: Setup) -> None:
    _, spec, statistics = setup
    plan = component.plan(Scoring(*setup), component.Options())
    for edit in plan.edits:
        site = next(site for site in spec.sites if site.tensor == edit.tensor)
        push = edit.dense() @ statistics.x_bar(site.key).float()  # type: ignore[union-attr]
        assert float(push @ statistics.difference(site.key).float()) > 0


@pytest.mark.parametrize(("heads", "neurons"), [(1, 0), (3, 7), (0, 1), (12, 144), (0.5, 0.1)])
def test_a_budget_edits_that_many_components(setup: Setup, heads: float, neurons: float) -> None:
    plan = component.plan(Scoring(*setup), component.Options(top_heads=heads, top_neurons=neurons, stable=False))
    count = {"attn_out": 0, "mlp_out": 0}
    for key, table in plan.scores.items():
        count[key.split(".")[0]] += int((table.lam != 0).sum())
    assert count == {
        "attn_out": heads if heads >= 1 else round(heads * 12),
        "mlp_out": neurons if neurons >= 1 else round(neurons * 144),
    }


@pytest.mark.parametrize("name", ["component", "steering"])
def test_components_of_unstable_sign_are_left_out_unless_asked_for(setup: Setup, name: str) -> None:
    module = methods.load(name)
    everything = {"top_heads": 1000, "top_neurons": 1000} if name == "component" else {"sites": "both"}
    plan = module.plan(Scoring(*setup), module.Options(**everything))
    stable = torch.cat([table.stable for table in plan.scores.values()])
    assert 0 < int(stable.sum()) < len(stable)
    lam = torch.cat([table.lam for table in plan.scores.values()])
    assert not bool(lam[~stable].any())
    every = module.plan(Scoring(*setup), module.Options(**everything, stable=False))
    assert bool(torch.cat([table.lam for table in every.scores.values()])[~stable].any())


def test_intervals_are_of_scores_on_resampled_examples(setup: Setup) -> None:
    checkpoint, spec, statistics = setup
    for key in ("attn_out.1", "mlp_out.2"):
        site = spec.site(key)
        W = checkpoint.read(site.tensor).float()
        v = statistics.resamples("bootstrap", key, "output").difference()
        x = statistics.resamples("bootstrap", key, "input").x_bar()
        size = site.in_features // site.components
        drawn = []
        for direction, x_bar in zip(v, x, strict=True):
            y = (W * x_bar).view(len(W), site.components, size).sum(dim=2)
            drawn.append(torch.cosine_similarity(y, direction[:, None], dim=0))
        deviation = torch.stack(drawn).std(dim=0)
        table = Scoring(*setup).score([site])[0].table
        assert table.interval is not None
        assert torch.allclose(table.interval[1] - table.g, 1.96 * deviation, atol=1e-4)
        assert torch.allclose(table.g - table.interval[0], 1.96 * deviation, atol=1e-4)


def test_a_matrix_is_read_once_however_many_plans_are_made(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = Scoring(*setup)
    read: list[str] = []
    blocks = Checkpoint.blocks
    monkeypatch.setattr(
        Checkpoint, "blocks", lambda self, info, *size: (read.append(info.name), blocks(self, info, *size))[1]
    )
    for heads in (1, 2, 3):
        component.plan(scoring, component.Options(top_heads=heads, top_neurons=5))
    assert sorted(read) == sorted(site.tensor for site in setup[1].sites)


def test_layers_are_respected(setup: Setup) -> None:
    for name in methods.names():
        module = methods.load(name)
        plan = module.plan(Scoring(*setup), module.Options(layers=(1, 1)))
        assert plan.edits and all(".layers.1." in edit.tensor for edit in plan.edits)
        with pytest.raises(Steer2EditError, match="0-2"):
            module.plan(Scoring(*setup), module.Options(layers=(1, 7)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rho_attn": 0.3}, "--alpha"),
        ({"rho_attn": 0.3, "alpha": 1.0}, "--alpha"),
        ({"rho_attn": 0.3, "alpha": 0.5, "top_heads": 3}, "exclude"),
        ({"tau_mlp": -1.0}, "--tau-mlp"),
        ({"top_heads": float("nan")}, "--top-heads"),
        ({"tau_mlp": 0.1, "slope": float("inf")}, "--slope"),
    ],
)
def test_contradictory_options_are_refused(setup: Setup, options: dict[str, float], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        component.plan(Scoring(*setup), component.Options(**options))  # type: ignore[arg-type]


def test_edits_that_are_not_finite_are_refused(setup: Setup) -> None:
    with pytest.raises(PlanError, match="not finite"):
        make_plan(Scoring(*setup), method="ablation", options=ablation.Options(alpha=float("nan")))


def test_rho_of_zero_leaves_a_class_alone(setup: Setup) -> None:
    plan = component.plan(Scoring(*setup), component.Options(rho_attn=0, rho_mlp=0.3, alpha=0.1))
    assert plan.edits and all("mlp" in edit.tensor for edit in plan.edits)


def test_ablation_leaves_no_output_along_its_direction(setup: Setup) -> None:
    checkpoint, spec, statistics = setup
    plan = ablation.plan(Scoring(checkpoint, spec, statistics), ablation.Options(direction_layer=2))
    r = statistics.difference("residual.2").float()
    for site in spec.sites:
        edit = plan.edit_of(site.tensor)
        assert isinstance(edit, LowRank)
        W = checkpoint.read(site.tensor) + edit.dense()
        assert float(((r / r.norm()) @ W).abs().max()) < 1e-5


def test_ablating_twice_is_ablating_once(setup: Setup) -> None:
    checkpoint, spec, statistics = setup
    plan = ablation.plan(Scoring(checkpoint, spec, statistics), ablation.Options(embedding=True))
    for edit in plan.edits:
        r_hat = -edit.B[:, 0]  # type: ignore[union-attr]
        W = checkpoint.read(edit.tensor)
        W = W.T if edit.tensor == spec.embedding.tensor else W
        once = W + edit.dense()  # type: ignore[union-attr]
        assert torch.allclose(once - torch.outer(r_hat, r_hat @ once), once, atol=1e-5)


def test_a_tied_embedding_is_never_ablated(tmp_path: Path, statistics_of: Callable[..., Any]) -> None:
    folder = save_tiny(tmp_path / "tied", llama_config(tie_word_embeddings=True, num_hidden_layers=1))
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    assert spec.tied_embeddings
    with pytest.raises(PlanError, match="ties its embedding"):
        ablation.plan(Scoring(checkpoint, spec, statistics_of(folder)), ablation.Options(embedding=True))


def test_weights_that_are_not_finite_are_named(tmp_path: Path, setup: Setup, tiny_llama: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(tiny_llama, folder)
    info = setup[0].tensors["model.layers.1.self_attn.o_proj.weight"]
    with open(folder / info.shard, "r+b") as file:
        file.seek(info.offset + 40)
        file.write(b"\x00\x00\xc0\x7f")
    checkpoint = open_checkpoint(folder)
    others = ("constant", "rotation", "transport")  # which read no writer
    for name in (one for one in methods.names() if one not in others):
        module = methods.load(name)
        with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight holds NaN"):
            module.plan(Scoring(checkpoint, setup[1], setup[2]), module.Options())


def test_statistics_of_another_model_are_refused(setup: Setup, tiny_llama_bf16: Path) -> None:
    other = open_checkpoint(tiny_llama_bf16)
    with pytest.raises(PlanError, match="capture them from this model"):
        make_plan(Scoring(other, read_spec(other), setup[2]))


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(Steer2EditError, match="component"):
        methods.load("magic")


@pytest.mark.parametrize("sites", ["attn", "mlp", "both"])
@pytest.mark.parametrize("carriers", [1.0, 0.3])
def test_steering_pushes_by_v_on_the_typical_input(setup: Setup, sites: str, carriers: float) -> None:
    checkpoint, spec, statistics = setup
    options = steering.Options(sites=sites, carriers=carriers)  # type: ignore[arg-type]
    plan = steering.plan(Scoring(checkpoint, spec, statistics), options)
    assert len(plan.edits) == (6 if sites == "both" else 3)
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        site = next(site for site in spec.sites if site.tensor == edit.tensor)
        push = edit.dense() @ statistics.x_bar(site.key).float()
        assert torch.allclose(push, statistics.difference(site.key).float(), atol=1e-5)
        carrying = (edit.A.view(site.components, -1) != 0).any(dim=1)
        assert int(carrying.sum()) <= max(1, round(carriers * site.components))


@pytest.mark.parametrize("moments", ["heads", "diagonal"])
def test_steering_takes_the_least_energy_for_its_push(setup: Setup, moments: str) -> None:
    checkpoint, spec, statistics = setup
    options = steering.Options(sites="both", moments=moments, stable=False, background=0.5, **steering.UNSAID)  # type: ignore[arg-type]
    plan = steering.plan(Scoring(checkpoint, spec, statistics), options)
    generator = torch.Generator().manual_seed(0)
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        site = next(site for site in spec.sites if site.tensor == edit.tensor)
        x_bar = statistics.x_bar(site.key).float()
        if site.heads is not None and moments == "heads":
            S = (statistics.block_moments(site.key, "contrast") + statistics.block_moments(site.key, "background")) / 2
        else:
            both = (statistics.energy(site.key) + statistics.energy(site.key, "background")) / 2
            S = both.float()[:, None, None]
        # the floor is part of what is minimised
        S = S + 0.01 * S.diagonal(dim1=1, dim2=2).mean() * torch.eye(S.shape[1])

        def energy(a: torch.Tensor, S: torch.Tensor = S) -> float:
            blocks = a.view(len(S), -1)
            return float(torch.einsum("hi,hij,hj->", blocks, S, blocks))

        a = edit.A[0] / statistics.difference(site.key).float().norm()
        for _ in range(5):
            other = a + 0.1 * torch.randn(len(a), generator=generator) * a.abs().mean()
            other = other / (other @ x_bar)
            assert energy(other) > energy(a) * 0.999


@pytest.mark.parametrize("carriers", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_of_carriers_is_a_share(setup: Setup, carriers: float) -> None:
    with pytest.raises(PlanError, match="--carriers"):
        steering.plan(Scoring(*setup), steering.Options(carriers=carriers))
