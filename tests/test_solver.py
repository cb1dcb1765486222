"""The solver's laws: the pushes that were asked for, for the least energy; nothing on texts to keep; the older default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steer2edit.architecture import read_spec
from steer2edit.architecture.sites import DEEP
from steer2edit.capture.moments import Moments
from steer2edit.capture.populations import Source
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.engines.own_answers import OwnAnswer
from steer2edit.errors import PlanError
from steer2edit.methods import steering
from steer2edit.methods._solver import EPS, SILENT_SHARE, Energy, SilentSpace, least_energy
from steer2edit.notices import collected
from steer2edit.plan import LowRank
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring, SiteScores

BACKGROUNDS: tuple[Source, ...] = ("background", "chat")


@pytest.fixture(scope="module")
def setup(loaded: LoadedModel, tiny_llama: Path, statistics_of: Callable[..., Any]) -> Scoring:
    """The tiny model's statistics, with chats beside them."""
    checkpoint = open_checkpoint(tiny_llama)
    statistics = statistics_of(tiny_llama)
    chats = [OwnAnswer(tuple(range(20 + i, 34 + 2 * i)), 4, True) for i in range(5)]
    behavior = Behavior("rows", ())
    chat = capture_statistics(loaded, checkpoint, behavior, background="", chat=chats)
    return Scoring(checkpoint, read_spec(checkpoint), statistics.merge(chat))


def functionals(scoring: Scoring, options: steering.Options) -> list[tuple[SiteScores, torch.Tensor]]:
    """Each edited site's ``a``, for a push of one."""
    plan = steering.plan(scoring, options)
    by_tensor = {edit.tensor: edit for edit in plan.edits if isinstance(edit, LowRank)}
    sites = [site for site in scoring.spec.sites if site.matrix in by_tensor]
    return [(one, by_tensor[one.site.matrix].A[0].double() / one.size) for one in scoring.score(sites)]


def with_keep(scoring: Scoring, low_rank: bool = False) -> Scoring:
    """The same with texts to keep: the chats' inputs turned about, or inputs that fill few directions of each head."""
    statistics = scoring.statistics
    moments, blocks = dict(statistics.moments), dict(statistics.blocks)
    generator = torch.Generator().manual_seed(1)
    for site in scoring.spec.sites:
        x = torch.randn(2 if low_rank else 4 * site.in_features, site.in_features, generator=generator).double()
        x = (x + 1) * statistics.x_bar(site.key).abs().mean()
        moments[site.key, "input", "keep"] = Moments(x.mean(dim=0), x.square().mean(dim=0))
        if site.heads is not None:
            heads = x.view(len(x), site.heads, -1)
            blocks[site.key, "keep"] = torch.einsum("nhi,nhj->hij", heads, heads).float() / len(x)
    examples = {**statistics.examples, "keep": 2}
    kept = replace(statistics, moments=moments, blocks=blocks, examples=examples)
    return Scoring(scoring.checkpoint, scoring.spec, kept)


@pytest.mark.parametrize("sites", ["attn", "both"])
@pytest.mark.parametrize("zero", ["both", "prose", "chat", "none"])
def test_the_mean_pushes_are_those_that_were_asked_for(setup: Scoring, sites: str, zero: str) -> None:
    options = steering.Options(sites=sites, zero_push=zero, stable=False)  # type: ignore[arg-type]
    silent = {"both": BACKGROUNDS, "prose": BACKGROUNDS[:1], "chat": BACKGROUNDS[1:], "none": ()}[zero]
    found = functionals(setup, options)
    assert len(found) == (6 if sites == "both" else 3)
    for one, a in found:
        assert float(a @ one.x_bar.double()) == pytest.approx(1.0, abs=1e-4)
        for source in BACKGROUNDS:
            push = float(a @ setup.statistics.mean(one.site.key, "input", source))  # type: ignore[arg-type]
            assert (abs(push) < 1e-4) == (source in silent)


def test_the_deeper_half_of_a_deep_model_carries_the_vector(setup: Scoring) -> None:
    def layers(count: int, options: steering.Options = steering.Options(), **source: object) -> object:  # noqa: B008
        statistics = replace(setup.statistics, source={**setup.statistics.source, **source})
        scoring = Scoring(setup.checkpoint, replace(setup.spec, layers=count), statistics)
        return steering.plan(scoring, options).method["layers"]

    assert layers(3) == [0, 2] and layers(DEEP - 1) == [0, DEEP - 2]
    assert layers(DEEP) == [6, 11] and layers(19) == [9, 18]
    assert layers(30, steering.Options(layers=(0, 29))) == [0, 29]
    # vectors from elsewhere have their own places
    assert layers(30, vectors={"format": "any"}) == [0, 29]


@pytest.mark.parametrize("heads", [True, False])
def test_no_other_functional_with_these_pushes_has_less_energy(heads: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator).double()
    blocks = torch.einsum("nhi,nhj->hij", x.view(200, 4, 6), x.view(200, 4, 6)) / 200
    S = Energy.of({"contrast": blocks if heads else x.square().mean(dim=0)}, {"contrast": 1.0})
    typical, *silent = torch.randn(4, 24, generator=generator).double()
    effects = [1.0, -0.5, 0.0, 0.0]
    a = least_energy(S.inverse, [typical, *silent], effects)
    assert a is not None
    M = torch.stack([typical, *silent], dim=1)
    assert torch.allclose(M.T @ a, torch.tensor(effects, dtype=torch.float64), atol=1e-10)
    free = torch.eye(24, dtype=torch.float64) - M @ torch.linalg.pinv(M)
    for _ in range(20):
        step = 0.1 * free @ torch.randn(24, generator=generator).double()
        assert energy(S, a + step) > energy(S, a)


def energy(S: Energy, a: torch.Tensor) -> float:
    if S.moments.ndim == 1:
        return float((S.moments * a.square()).sum())
    blocks = a.view(len(S.moments), -1)
    return float(torch.einsum("hi,hij,hj->", blocks, S.moments, blocks))


def test_an_input_that_is_a_mixture_of_silent_ones_gets_no_functional() -> None:
    S = Energy(torch.ones(5, dtype=torch.float64))
    one, two = torch.rand(2, 5).double()

    def solve(inputs: list[torch.Tensor], *effects: float) -> torch.Tensor | None:
        return least_energy(S.inverse, inputs, effects)

    assert solve([one + two, one, two], 1, 0, 0) is None
    assert solve([torch.zeros(5)], 1) is None
    # nor has one whose effect contradicts the others', or that is nothing
    assert solve([one, two, one - two], 1, 0, -0.5) is None and solve([one, torch.zeros(5)], 1, -0.5) is None
    # a silent input that is nothing asks for nothing
    assert solve([one, torch.zeros(5)], 1, 0) is not None
    # and the same one twice asks for it once
    assert torch.allclose(solve([one, two, two], 1, 0, 0), solve([one, two], 1, 0))  # type: ignore[arg-type]


def test_a_plan_whose_matrices_can_all_push_nowhere_is_refused(setup: Scoring) -> None:
    statistics = setup.statistics
    moments = {
        (key, side, population): (
            replace(one, mean=statistics.x_bar(key)) if (side, population) == ("input", "chat") else one
        )
        for (key, side, population), one in statistics.moments.items()
    }
    same = Scoring(setup.checkpoint, setup.spec, replace(statistics, moments=moments))
    with pytest.raises(PlanError, match="--zero-push none"):
        steering.plan(same, steering.Options(stable=False))


@pytest.mark.parametrize("sites", ["attn", "both"])
def test_weights_of_prose_alone_are_the_older_default(setup: Scoring, sites: str) -> None:
    options = steering.Options(background=0.5, sites=sites, **steering.UNSAID)  # type: ignore[arg-type]
    for one, a in functionals(setup, options):
        key, n = one.site.key, one.site.components
        x = one.x_bar.double().view(n, -1)
        if one.site.heads is not None:
            S = sum(0.5 * setup.statistics.block_moments(key, source).double() for source in ("contrast", "background"))  # type: ignore[arg-type]
        else:
            both = (setup.statistics.energy(key, source) for source in ("contrast", "background"))  # type: ignore[arg-type]
            S = sum(0.5 * part for part in both)[:, None, None]  # type: ignore[index]
        S = S + EPS * S.diagonal(dim1=1, dim2=2).mean() * torch.eye(S.shape[1])
        plain = torch.linalg.solve(S, x) * one.table.stable[:, None]
        assert torch.allclose(a, (plain / (plain * x).sum()).flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["soft", "hard"])
def test_texts_to_keep_get_no_mean_push(setup: Scoring, how: str) -> None:
    scoring = with_keep(setup)
    options = steering.Options(keep_as=how, stable=False)  # type: ignore[arg-type]
    plain = {one.site.key: a for one, a in functionals(setup, steering.Options(stable=False))}
    for one, a in functionals(scoring, options):
        kept = scoring.statistics.mean(one.site.key, "input", "keep")
        assert abs(float(a @ kept)) < 1e-4 < abs(float(plain[one.site.key] @ kept))
        assert float(a @ one.x_bar.double()) == pytest.approx(1.0, abs=1e-4)
        moments = Energy(scoring.statistics.block_moments(one.site.key, "keep").double())
        if how == "hard":
            blocks = moments.moments.diagonal(dim1=1, dim2=2).sum(dim=1)
            bound = SILENT_SHARE * (blocks * a.view(len(blocks), -1).square().sum(dim=1)).sum()
            assert energy(moments, a) <= float(bound)
        else:
            assert energy(moments, a) < energy(moments, plain[one.site.key])


def test_a_hard_null_space_has_no_energy_on_texts_that_leave_one(setup: Scoring) -> None:
    scoring = with_keep(setup, low_rank=True)
    for one, a in functionals(scoring, steering.Options(keep_as="hard", stable=False)):
        moments = Energy(scoring.statistics.block_moments(one.site.key, "keep").double())
        scale = float(moments.moments.diagonal(dim1=1, dim2=2).sum() * a.square().sum())
        assert energy(moments, a) < 1e-6 * scale


def test_single_columns_have_the_coordinates_of_least_energy() -> None:
    space = SilentSpace.of(torch.tensor([0.0, 5.0, 0.001, 4.0], dtype=torch.float64))
    assert space.inside.tolist() == [True, False, True, False]
    S = Energy(torch.full((4,), 2.0, dtype=torch.float64))
    assert space.inverse(S)(torch.ones(4, 1, dtype=torch.float64))[:, 0].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_statistics_without_chats_give_their_weight_to_the_others(setup: Scoring) -> None:
    statistics = setup.statistics
    bare = replace(
        statistics,
        examples={**statistics.examples, "chat": 0},
        source={key: value for key, value in statistics.source.items() if key != "chat"},
    )
    plan = steering.plan(Scoring(setup.checkpoint, setup.spec, bare), steering.Options())
    assert plan.method["weights"] == pytest.approx({"contrast": 1 / 3, "background": 2 / 3})
    assert plan.method["no_push_on"] == ["background"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"background": 1.5}, "--background-weight"),
        ({"chat": float("nan")}, "--chat-weight"),
        ({"background": 0.7, "chat": 0.7}, "together more than 1"),
        ({"keep_weight": -1.0}, "--keep-weight"),
    ],
)
def test_weights_out_of_range_are_refused(setup: Scoring, options: dict[str, float], what: str) -> None:
    with pytest.raises(PlanError, match=what):
        steering.plan(setup, steering.Options(**options))  # type: ignore[arg-type]


def test_old_files_are_read_and_say_that_they_hold_no_chats(setup: Scoring, tmp_path: Path) -> None:
    statistics = setup.statistics
    old = replace(
        statistics,
        examples={**statistics.examples, "chat": 0},
        source={key: value for key, value in statistics.source.items() if key not in ("chat", "keep")},
        moments={key: one for key, one in statistics.moments.items() if key[2] != "chat"},
        blocks={key: one for key, one in statistics.blocks.items() if key[1] != "chat"},
    )
    path = tmp_path / "x.stats.safetensors"
    old.save(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"steer2edit.statistics.4", b"steer2edit.statistics.2"))
    again = Statistics.load(path)
    assert again.examples == old.examples
    with collected() as notices:
        plan = steering.plan(Scoring(setup.checkpoint, setup.spec, again), steering.Options())
    assert plan.edits and any("older versions" in text for text in notices)
