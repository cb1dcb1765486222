"""Masks are as exact as they say, on every family; rankings find what was planted, and not what was not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from data_folders import write_data_folder
from mask_laws import artefact, everywhere, largest, logits, mask_plan, reference, selected, silenced
from mixture_models import EXPERTS, MIXTURE_TYPES, MODELS, TOP_K, Case, mixture_config, save_mixture

from steer2edit.artefact.verify import verify
from steer2edit.capture.statistics import Statistics
from steer2edit.data.answers import LABELS
from steer2edit.errors import DataError, PlanError
from steer2edit.experts.edits import Request, lower_experts, strongest
from steer2edit.experts.ranking import alignments, expert_table, false_discovery, ranking, weakest_for_pruning
from steer2edit.experts.router_rows import selection_shares, separating
from steer2edit.notices import collected


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    root = tmp_path_factory.mktemp("experts")
    return functools.cache(lambda name: Case(MODELS[name](root / name)))


@pytest.fixture(params=MIXTURE_TYPES)
def case(request: pytest.FixtureRequest, build: Callable[[str], Case]) -> Case:
    return build(request.param)


def test_a_masked_expert_is_never_chosen_and_the_logits_are_the_references(case: Case, tmp_path: Path) -> None:
    base = case.loaded()
    before = logits(base)
    router = case.spec.routers[0]
    way = strongest(router)
    plan = mask_plan(case, way)
    masked = artefact(case, plan, tmp_path / "out")
    grade = plan.method["experts"][0]["grade"]
    expected = reference(case, base, absent=plan.method["experts"][0]["reference"] == "absent")
    assert largest(before, expected) > 1e-2
    if way == "row":
        assert grade == "approximate" and selected(case, masked) <= 0.05
        assert plan.method["experts"][0]["selected"] <= 0.05
    else:
        assert grade == "exact" and selected(case, masked) == 0
        assert largest(logits(masked), expected) <= (1e-5 if way == "bias" else 1e-3)


def test_a_silenced_expert_is_another_function_and_says_so(case: Case, tmp_path: Path) -> None:
    plan = mask_plan(case, "zero")
    assert {one["grade"] for one in plan.method["experts"]} == {"another function"}
    base = case.loaded()
    found = logits(artefact(case, plan, tmp_path / "out"))
    assert largest(found, silenced(case, base)) <= 1e-5
    assert largest(found, reference(case, base, absent=True)) > 1e-3


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "lfm2_moe", "hy_v3"])
def test_a_forced_expert_is_always_chosen(build: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    case = build(name)
    request = Request.of(off=everywhere(case), on=everywhere(case, (3,)))
    plan = lower_experts(case.checkpoint, case.spec, request)
    loaded = artefact(case, plan, tmp_path / "out")
    shares, _ = selection_shares(loaded, case.spec.routers, [list(range(4, 60))])
    assert all(float(shares[layer][expert]) == 1 for layer, expert in everywhere(case, (3,)))
    assert selected(case, loaded) == 0
    assert verify(tmp_path / "out", base=case.folder).ok


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "granitemoe", "deepseek_v3", "dbrx"])
def test_a_gain_multiplies_what_an_expert_writes(build: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    case = build(name)
    gains = dict.fromkeys(everywhere(case), 0.5)
    plan = lower_experts(case.checkpoint, case.spec, Request.of(gains=gains))
    twice = lower_experts(case.checkpoint, case.spec, Request.of(gains=dict.fromkeys(gains, 0.25)))
    artefact(case, plan, tmp_path / "half")
    assert verify(tmp_path / "half", base=case.folder).ok
    half = Case(tmp_path / "half")
    again = lower_experts(half.checkpoint, half.spec, Request.of(gains=gains))
    a = logits(artefact(half, again, tmp_path / "quarter"))
    b = logits(artefact(case, twice, tmp_path / "at-once"))
    assert largest(a, b) <= 1e-6


@pytest.mark.parametrize(
    ("model_type", "setting"), [("qwen3_moe", "num_experts_per_tok"), ("gemma4_text", "top_k_experts")]
)
def test_fewer_experts_per_token_are_a_line_in_the_config(
    build: Callable[[str], Case], tmp_path: Path, model_type: str, setting: str
) -> None:
    case = build(model_type)
    plan = lower_experts(case.checkpoint, case.spec, Request.of(top_k=1))
    artefact(case, plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[setting] == 1
    result = verify(tmp_path / "out", base=case.folder)
    assert result.ok and result.numbers["effect"] > 1e-2, result.problems


GROUPED = {"n_group": 4, "topk_group": 2}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(save_mixture(tmp_path_factory.mktemp("grouped"), mixture_config("deepseek_v3", **GROUPED)))


def refusal(case: Case, request: Request, **how: Any) -> str:
    with pytest.raises(PlanError) as caught:
        lower_experts(case.checkpoint, case.spec, request, **how)
    return str(caught.value)


def test_group_limited_routing_is_masked_by_whole_groups_or_refused(grouped: Case, tmp_path: Path) -> None:
    # groups of two, ranked by their best two: half a group cannot be switched off
    assert "left with one expert" in refusal(grouped, Request.of([(1, 0)]))
    plan = lower_experts(grouped.checkpoint, grouped.spec, Request.of([(1, 0), (1, 1), (2, 6), (2, 7)]))
    loaded = artefact(grouped, plan, tmp_path / "out")
    shares, _ = selection_shares(loaded, grouped.spec.routers, [list(range(4, 60))])
    assert float(shares[1][:2].sum() + shares[2][6:].sum()) == 0
    assert verify(tmp_path / "out", base=grouped.folder).ok


def test_a_group_that_holds_too_few_for_a_token_brings_a_masked_expert_back(tmp_path: Path) -> None:
    settings = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    case = Case(save_mixture(tmp_path / "model", mixture_config("deepseek_v3", **settings)))
    assert "would come back" in refusal(case, Request.of([(1, 0), (1, 1)]))
    lower_experts(case.checkpoint, case.spec, Request.of([(1, 0), (1, 7)]))


def test_pruning_cuts_as_many_from_every_layer_and_group_or_is_refused(grouped: Case, tmp_path: Path) -> None:
    uneven = refusal(grouped, Request.of([(1, 0), (2, 1), (2, 3)]), how="prune")
    assert "one number in the config" in uneven
    one_group = Request.of([(layer, expert) for layer in (1, 2) for expert in (0, 1)])
    assert "as many must go from each" in refusal(grouped, one_group, how="prune")
    even = Request.of([(layer, expert) for layer in (1, 2) for expert in (0, 3, 4, 7)])
    plan = lower_experts(grouped.checkpoint, grouped.spec, even, how="prune")
    artefact(grouped, plan, tmp_path / "out")


def test_what_cannot_be_done_is_told_all_at_once(build: Callable[[str], Case]) -> None:
    case = build("qwen3_moe")
    told = refusal(case, Request.of([(0, 1), (1, 99)], on=[(1, 2)]))
    assert "layer 0 has no experts" in told and "there is no 99" in told
    assert "selection bias, which its router has not" in refusal(case, Request.of(on=[(1, 2)]))
    assert "no bias" in refusal(case, Request.of([(1, 2)]), how="bias")
    assert "no router row was fitted" in refusal(case, Request.of([(1, 2)]))
    too_many = Request.of([(1, e) for e in range(EXPERTS - TOP_K + 1)])
    assert "1 expert would be left, and each token takes 2" in refusal(build("deepseek_v3"), too_many)
    assert "nothing is asked for" in refusal(case, Request.of())
    assert "off and on" in refusal(build("deepseek_v3"), Request.of([(1, 2)], on=[(1, 2)]))


def test_a_row_that_tokens_still_choose_is_refused(build: Callable[[str], Case]) -> None:
    with pytest.raises(PlanError, match="held-out tokens still choose it"):
        mask_plan(build("mixtral"), "row", bound=-1.0)


def test_a_direction_separates_whatever_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(500, 32, generator=generator)
    hidden = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    # all on one side of a plane, and many hardly so
    X = X * (X @ hidden).sign()[:, None] + 0.05 * hidden
    assert ((X @ separating(X)) > 0).all()


def statistics_with(case: Case, statistics_of: Callable[..., Any]) -> Statistics:
    if case.statistics is None:
        case.statistics = statistics_of(case.folder)
    return case.statistics  # type: ignore[no-any-return]


def test_an_expert_that_one_class_alone_uses_leads_the_ranking(
    build: Callable[[str], Case], statistics_of: Callable[..., Any]
) -> None:
    statistics = statistics_with(build("qwen3_moe"), statistics_of)
    planted = {}
    for (key, side, population), moments in statistics.moments.items():
        if key == "selected.response.2" and population in ("positive", "negative"):
            rate = 0.9 if population == "negative" else 0.1
            mean, m2 = moments.mean.clone(), moments.m2.clone()
            mean[5], m2[5] = rate, rate**2 + 0.01
            planted[key, side, population] = type(moments)(mean, m2)
    drawn = dict(statistics.resampled)
    name = ("bootstrap", "selected.response.2", "output")
    means = drawn[name].means.clone()
    means[:, 0, 5], means[:, 1, 5] = 0.1, 0.9
    drawn[name] = type(drawn[name])(means)
    changed = replace(statistics, moments={**statistics.moments, **planted}, resampled=drawn)
    table = expert_table(changed)
    first = ranking(table, 3)[0]
    assert (first.layer, first.expert, first.stability) == (2, 5, 1.0)
    assert first.q < 1e-3 and first.difference == pytest.approx(-0.8)
    # the same numbers from a prompt or two are no evidence
    source = {**changed.source, "distinct_prompts": {"positive": 2, "negative": 40}}
    with collected() as notices:
        few = expert_table(replace(changed, source=source))
    assert bool((few.q == 1).all()) and ranking(few, 3)[0].stability == 0 and "2 distinct prompts" in notices[0]
    # subtracting the same as a control leaves nothing
    assert not ranking(expert_table(changed, control=changed), 3)
    chosen = weakest_for_pruning(table, 2)
    assert (2, 5) in chosen and len(chosen) == 2 * len(table.layers)


def test_the_same_prompts_in_both_classes_tell_nothing_of_prompts(
    build: Callable[[str], Case], statistics_of: Callable[..., Any]
) -> None:
    with pytest.raises(DataError, match="the same prompts"):
        expert_table(statistics_with(build("qwen3_moe"), statistics_of), scope="prompt")


def test_alignment_is_a_cosine_of_what_experts_write(
    build: Callable[[str], Case], statistics_of: Callable[..., Any]
) -> None:
    """Weighed by their sizes the experts' shares add up to the layer's mean output."""
    case = build("gpt_oss")
    statistics = statistics_with(case, statistics_of)
    aligned = alignments(statistics, case.spec, case.checkpoint)
    assert aligned.shape == (3, EXPERTS) and bool(aligned.any())
    for layer in range(3):
        v = statistics.difference(f"experts_out.{layer}")
        along = 0.0
        for expert in range(EXPERTS):
            site = case.spec.site(f"expert_out.{layer}.{expert}")
            share = sum(statistics.experts[layer, label].weighted[expert] for label in LABELS) / 2
            mass = sum(statistics.mean(f"mass.response.{layer}", "output", label)[expert] for label in LABELS) / 2
            bias = case.checkpoint.read(site.locate(case.checkpoint, site.bias_vector)).double()
            size = float((case.matrix(site).double() @ share + bias * mass).norm())
            along += float(aligned[layer, expert]) * size
        written = sum(statistics.mean(f"experts_out.{layer}", "output", label) for label in LABELS) / 2
        assert along == pytest.approx(float(v @ written / v.norm()), rel=1e-4, abs=1e-6)


def test_false_discovery_rates_are_benjamini_and_hochbergs() -> None:
    p = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205]
    z = torch.tensor([float(torch.special.ndtri(torch.tensor(1 - one / 2, dtype=torch.float64))) for one in p])
    q = false_discovery(z.double())
    by_hand = [min(p[j] * len(p) / (j + 1) for j in range(i, len(p))) for i in range(len(p))]
    assert q.tolist() == pytest.approx(by_hand, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    assert int((false_discovery(noise) <= 0.05).sum()) <= 2


def test_the_commands_profile_show_and_mask(build: Callable[[str], Case], tmp_path: Path) -> None:
    folder = build("deepseek_v3").folder
    data = write_data_folder(tmp_path / "data")
    stats, plot = tmp_path / "x.stats.safetensors", tmp_path / "map.png"
    made = run("experts", "profile", folder, "--data", data, "-o", stats, "--plot", plot, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["experts"] == EXPERTS and found["ranking"][0]["alignment"] is not None
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = run("experts", "show", stats, "--top", 3, "--by", "z")
    assert shown.exit_code == 0 and "ranked by z" in shown.stdout
    out = tmp_path / "out"
    masked = run(
        "experts", "mask", folder, "--stats", stats, "--top", 2, "--min-stability", 0, "-o", out, "--json", "--plan",
        tmp_path / "x.plan.safetensors",
    )  # fmt: skip
    assert masked.exit_code == 0, masked.output
    result = json.loads(masked.stdout)
    assert (
        result["grade"] == "2 experts off by bias (exact, unselected)"
        and result["measured"]["costs"]["prose"]["tokens"] > 100
    )
    checked = run("verify", out, "--base", folder, "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["numbers"]["experts"]["selected"] == 0
    assert run("show", tmp_path / "x.plan.safetensors").exit_code == 0
    for wrong in (["--experts", "1-2"], ["--experts", "1:2", "--stats", stats], ["--gain", "1:2=x"], []):
        refused = run("experts", "mask", folder, *wrong, "-o", tmp_path / "no")
        assert refused.exit_code == 2 and not (tmp_path / "no").exists()


def test_a_dense_model_has_no_experts(tiny_llama: Path, tmp_path: Path) -> None:
    refused = run("experts", "mask", tiny_llama, "--experts", "0:1", "-o", tmp_path / "no")
    assert refused.exit_code == 2 and "not a mixture of experts" in refused.stderr
