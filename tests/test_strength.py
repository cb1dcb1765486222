"""KL by streaming equals KL by definition, and the search meets its budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import family_config

import steer2edit
from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import DataError, PlanError, Steer2EditError
from steer2edit.methods import make_plan, steering
from steer2edit.plan import Base, Divergence, EditPlan, LowRank
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.line_search import Strength, find_strength, quadratic_start
from steer2edit.strength.meet import at, estimate, meet
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts
from steer2edit.strength.settle import settle_strength

TEXT = "the old cat sees a small bird and the river runs . " * 12


@pytest.fixture(scope="module")
def plan(tiny_llama: Path, loaded: LoadedModel, statistics_of: Callable[..., Any]) -> EditPlan:
    return make_plan(Scoring(open_checkpoint(tiny_llama), loaded.spec, statistics_of(tiny_llama)))


def log_probabilities(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def test_kl_and_perplexity_are_those_of_the_definition(loaded: LoadedModel, plan: EditPlan) -> None:
    neutral = NeutralText(loaded, TEXT, window=50)
    kls, losses = [], []
    with edited(loaded, plan, 0.3):
        found = neutral.measure()
    ids = loaded.tokenizer(TEXT)["input_ids"]
    for window in (ids[i : i + 50] for i in range(0, len(ids), 50)):
        if len(window) > 1:
            p = log_probabilities(loaded, window)
            with edited(loaded, plan, 0.3):
                q = log_probabilities(loaded, window)
            kls.append((p.exp() * (p - q)).sum(-1))
            losses.append(-q.gather(1, torch.tensor(window[1:])[:, None])[:, 0])
    assert found.tokens == sum(map(len, kls)) == neutral.tokens
    assert found.kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-4)


def test_the_kl_of_an_edited_unembedding_is_that_of_both_models_logits(loaded: LoadedModel) -> None:
    spec = loaded.spec
    head = next(site for site in spec.readers if site.role is MatrixRole.UNEMBED)
    torch.manual_seed(0)
    edit = LowRank(head.matrix, torch.randn(head.out_features, 1), 0.1 * torch.randn(1, head.in_features))
    plan = EditPlan(Base("tiny", None, ""), (edit,))
    neutral = NeutralText(loaded, TEXT, window=50)
    rows = [torch.tensor([row]) for row in neutral._rows]
    before = [loaded.model(input_ids=row, use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows]
    with edited(loaded, plan):
        measured, glanced = neutral.measure(), neutral.measure(glance=True)
        after = [loaded.model(input_ids=row, use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)])
    assert measured.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert glanced.kl > 0.01 and neutral.measure().kl == pytest.approx(0, abs=1e-6)


def _without_reference(neutral: NeutralText) -> NeutralText:
    other = copy.copy(neutral)
    other._reference = None
    return other


@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.3, 3.0])
@pytest.mark.parametrize(
    ("model_type", "changes", "affine"),
    [
        ("llama", {}, True),
        ("cohere", {"logit_scale": 0.0625}, True),  # logits are scaled
        ("granite", {"logits_scaling": 8.0}, True),
        ("phi", {}, True),  # a bias
        ("gemma2", {"final_logit_softcapping": 2.0}, False),
    ],
)
def test_kl_from_kept_expectations_is_kl_from_logits(
    model_type: str, changes: dict[str, Any], affine: bool, strength: float, tmp_path: Path,
    statistics_of: Callable[..., Any],
) -> None:  # fmt: skip
    folder = save_tiny(tmp_path / "model", family_config(model_type, **changes))
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, read_spec(checkpoint))
    made = make_plan(Scoring(checkpoint, model.spec, statistics_of(folder)))
    neutral = NeutralText(model, TEXT, window=20)
    assert (neutral._reference is not None) == affine
    with edited(model, made, strength):
        quick, full = neutral.windows(), _without_reference(neutral).windows()
    assert quick.tokens == full.tokens
    for name in ("kl", "base_loss", "loss"):
        assert getattr(quick, name) == pytest.approx(getattr(full, name), rel=1e-4, abs=2e-5), name


def test_in_bfloat16_kl_from_kept_expectations_is_close(
    tiny_llama_bf16: Path, statistics_of: Callable[..., Any]
) -> None:
    checkpoint = open_checkpoint(tiny_llama_bf16)
    model = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="bfloat16"))
    made = make_plan(Scoring(checkpoint, model.spec, statistics_of(tiny_llama_bf16)))
    neutral = NeutralText(model, TEXT, window=20)
    assert neutral._reference is not None and neutral.measure().kl == 0
    with edited(model, made, 0.3):
        quick, full = neutral.measure(), _without_reference(neutral).measure()
    assert quick.kl == pytest.approx(full.kl, rel=0.02) and quick.perplexity == pytest.approx(full.perplexity)


def test_another_unembedding_is_noticed(loaded: LoadedModel, tiny_llama: Path) -> None:
    other = load_model(open_checkpoint(tiny_llama), loaded.spec)
    neutral = NeutralText(loaded, TEXT)
    assert neutral.measure(other).kl == 0
    other.model.lm_head.weight += 0.1 * torch.randn_like(other.model.lm_head.weight)
    assert neutral.measure(other).kl == pytest.approx(_without_reference(neutral).measure(other).kl, rel=1e-6)
    assert neutral.measure(other).kl > 1e-4


def test_an_unedited_model_has_no_divergence(loaded: LoadedModel) -> None:
    found = NeutralText(loaded, TEXT).measure()
    assert abs(found.kl) < 1e-9 and found.perplexity == pytest.approx(found.base_perplexity)


def test_documents_are_read_one_by_one(loaded: LoadedModel) -> None:
    documents = [TEXT[:50], TEXT[:80]]
    tokens = [len(loaded.tokenizer(text)["input_ids"]) for text in documents]
    assert NeutralText(loaded, documents).tokens == sum(tokens) - 2


def test_every_window_begins_with_the_bos(loaded: LoadedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(loaded.tokenizer)  # the child process of the shared one has its state from before
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    windows = NeutralText(replace(loaded, tokenizer=tokenizer), TEXT, window=20)._rows
    assert len(windows) > 2 and all(window[0] == 1 and 1 not in window[1:] for window in windows)


@pytest.mark.parametrize(("limit", "count"), [(None, 9), (1000, 9), (6, 6), (1, 4)])
def test_a_limit_bounds_the_neutral_text_too(loaded: LoadedModel, limit: int | None, count: int) -> None:
    long = "the old cat sees a small bird . " * 140
    assert len(neutral_texts(loaded, long, limit=limit).budget.rows) == count


def test_too_little_text_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="expected at least"):
        NeutralText(loaded, "a cat")


def test_the_search_gets_close_to_the_budget_and_not_over(loaded: LoadedModel, plan: EditPlan) -> None:
    settled = settle_strength(loaded, plan, kl_budget=0.03, neutral=NeutralTexts(NeutralText(loaded, TEXT, window=20)))
    assert 0.0285 <= settled.measured.kl <= 0.03
    assert len(settled.measured.steps or ()) <= 4
    cost = settled.measured.divergence
    assert cost is not None and cost.low < cost.kl < cost.high
    neutral = NeutralText(loaded, TEXT, window=20)
    with edited(loaded, settled):
        assert neutral.measure().kl == pytest.approx(settled.measured.kl, rel=1e-3)


@pytest.mark.parametrize(
    "curve",
    [
        lambda s: s**2,
        lambda s: 1e-6 * s**2,
        lambda s: 1e4 * s**2,
        lambda s: s**2 if s < 0.1 else 5 + s,
        lambda s: math.inf if s > 0.01 else s**2,
        lambda s: 3 * s**1.2,
    ],
)
def test_the_search_copes_with_any_rising_curve(curve: Callable[[float], float]) -> None:
    measured: list[float] = []

    def measure(strength: float) -> Divergence:
        measured.append(strength)
        return Divergence(curve(strength), 0.0, 0.0, 1, 1.0, 1.0, 0.0)

    found = find_strength(measure, 0.05)
    assert found.divergence.kl <= 0.05
    assert len(measured) <= 12
    # what is left of the budget could not have been used: a little more strength would be over it
    assert found.divergence.kl >= 0.04 or curve(found.strength * 1.2) > 0.05


def test_no_strength_for_an_edit_that_breaks_everything() -> None:
    with pytest.raises(Steer2EditError, match="no strength met"):
        find_strength(lambda _: Divergence(math.nan, 0.0, 0.0, 1, 1.0, 1.0, 0.0), 0.05)


def test_the_closed_form_is_exact_for_a_quadratic_and_close_for_a_plan(loaded: LoadedModel, plan: EditPlan) -> None:
    def glance(strength: float) -> Divergence:
        return Divergence(math.nan, 0.0, 0.0, 1, 1.0, 1.0, 7.0 * strength**2)

    for probe in (1e-4, 0.1, 100.0):
        assert quadratic_start(glance, 0.05, probe=probe) == pytest.approx(math.sqrt(0.05 / 7))
    neutral, apply = NeutralText(loaded, TEXT), partial(edited, loaded, plan)
    start = estimate(apply, neutral, 0.001)
    assert at(apply, neutral, start).divergence.kl == pytest.approx(0.001, rel=0.3)
    # KL becomes its quadratic as the edit gets small
    with apply(start / 4):
        small = neutral.measure(glance=True)
    assert small.kl == pytest.approx(small.quadratic, rel=0.05)


def test_what_meets_a_budget_is_what_was_measured_there(loaded: LoadedModel, plan: EditPlan) -> None:
    neutral = NeutralText(loaded, TEXT)
    vectors = {site.key: torch.full((site.out_features,), 0.1) for site in loaded.spec.sites}
    for apply in (partial(edited, loaded, plan), partial(steered, loaded, vectors)):
        met = meet(apply, neutral, 0.02)
        assert 0.95 * 0.02 <= met.divergence.kl <= 0.02
        assert met.steps[-1] == (met.strength, met.divergence.kl)
        assert at(apply, neutral, met.strength) == Strength(met.strength, met.divergence, (), met.windows)
    assert at(partial(edited, loaded, plan), neutral, 0.0).divergence.kl == 0


def test_one_place_applies_an_edit_and_measures_it() -> None:
    package = Path(steer2edit.__file__).parent
    for name, homes in (
        ("find_strength(", {"line_search.py", "meet.py"}),
        ("quadratic_start(", {"line_search.py", "meet.py"}),
        # the metric measures whatever candidate the model is
        ("text.windows(glance=", {"meet.py"}),
        (".measure().kl", set()),
    ):
        assert {path.name for path in package.rglob("*.py") if name in path.read_text(encoding="utf-8")} == homes, name


def test_windows_add_up_and_a_glance_is_some_of_them(loaded: LoadedModel, plan: EditPlan) -> None:
    neutral = NeutralText(loaded, TEXT, window=20, batch_tokens=64)
    with edited(loaded, plan, 0.3):
        windows, whole, glance = neutral.windows(), neutral.measure(), neutral.windows(glance=True)
    assert sum(windows.kl) / sum(windows.tokens) == pytest.approx(whole.kl)
    assert 0 < len(glance.kl) < len(windows.kl)
    assert all(any(a == pytest.approx(b, rel=1e-3) for b in windows.kl) for a in glance.kl)


def test_classes_keep_their_own_budgets(
    tiny_llama: Path, loaded: LoadedModel, statistics_of: Callable[..., Any]
) -> None:
    scoring = Scoring(open_checkpoint(tiny_llama), loaded.spec, statistics_of(tiny_llama))
    both = make_plan(scoring, options=steering.Options(sites="both"))
    neutral = neutral_texts(loaded, TEXT)
    settled = settle_strength(
        loaded, both, class_budgets={MatrixRole.ATTN_OUT: 0.02, MatrixRole.MLP_OUT: 0.005}, neutral=neutral
    )
    for role, budget in (("self_attn", 0.02), ("mlp", 0.005)):
        part = replace(settled, edits=tuple(edit for edit in settled.edits if role in edit.tensor))
        with edited(loaded, part):
            assert 0.94 * budget <= neutral.budget.measure().kl <= budget
    bounded = settle_strength(
        loaded,
        both,
        kl_budget=0.004,
        class_budgets={MatrixRole.ATTN_OUT: 0.02, MatrixRole.MLP_OUT: 0.0},
        neutral=neutral,
    )
    assert bounded.measured.kl <= 0.004 and all("self_attn" in edit.tensor for edit in bounded.edits)
    with pytest.raises(PlanError, match="--kl-budget-mlp"):
        settle_strength(loaded, both, class_budgets={MatrixRole.ATTN_OUT: 0.02}, neutral=neutral)
