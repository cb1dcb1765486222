"""The report: it says what the numbers say, escapes whatever comes from data, and needs nothing from outside."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit import figures
from steer2edit.errors import Steer2EditError
from steer2edit.evaluate import Evaluation, Row
from steer2edit.figures import BLUE, GREY, ORANGE, heatmap
from steer2edit.metrics import Metric, Sample
from steer2edit.page import Report, render_page, verdict, write_report
from steer2edit.plan import Base, EditPlan, LowRank, Scores

pytest.importorskip("matplotlib")

METRICS = (
    Metric("KL", "utility", "less", "nats/token"),
    Metric("perplexity", "utility", "less", exponential=True),
    Metric("length", "attribute", "less", "tokens"),
    Metric("preferred", "attribute", "more"),
    Metric("repetition", "check", "less"),
)
VOID = {"meta", "br", "hr", "img", "link"}


def make_plan(
    layers: int = 3,
    heads: int = 4,
    neurons: int = 16,
    *,
    resampled: bool = True,
    lam: float = 1.0,
    name: str = "concise",
) -> EditPlan:
    """A plan with a table for every layer; 0 heads or neurons leave that kind out."""
    generator = torch.Generator().manual_seed(0)

    def table(count: int) -> Scores:
        g = torch.randn(count, generator=generator) * 0.12
        null = torch.randn(count, generator=generator) * 0.05
        width = 0.04 + 0.05 * torch.rand(count, generator=generator)
        strength = torch.where(g.abs() > 0.1, g * lam, torch.zeros(count))
        return (
            Scores(g, strength, g * 3, torch.stack((g - width, g + width)), null)
            if resampled
            else Scores(g, strength, g)
        )

    kinds = {"attn_out": heads, "mlp_out": neurons}
    scores = {f"{role}.{layer}": table(n) for layer in range(layers) for role, n in kinds.items() if n}
    edits = tuple(
        LowRank(f"model.layers.{i}.self_attn.o_proj.weight", torch.ones(8, 1), torch.full((1, 8), 0.02 * (i + 1)))
        for i in range(layers)
    )
    measured = {
        "strength": 0.83,
        "kl_budget": 0.05,
        "kl": 0.0483,
        "low": 0.043,
        "high": 0.054,
        "tokens": 4080,
        "base_perplexity": 32.29,
        "perplexity": 32.84,
        "quadratic": 0.05,
        "steps": [[1.0, 0.07], [0.83, 0.0483]],
    }
    data = {"name": name, "data": "d" * 64, "examples": {"positive": 48, "negative": 48}, "tokens": {"positive": 900}}
    base = Base("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac", "f" * 64)
    return EditPlan(
        base, edits, scores, {"name": "component", "rho_attn": 0.3, "layers": [0, layers - 1]}, measured, data
    )


def make_evaluation(
    questions: int = 24, *, edit: float = -0.45, random: float = -0.02, strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
) -> Evaluation:
    """Candidates whose answers are shortened by the shares ``edit`` and ``random``."""
    generator = torch.Generator().manual_seed(1)
    lengths = 60 + 60 * torch.rand(questions, generator=generator)
    windows = 16

    def row(name: str, kind: str, share: float, kl: float, note: str = "", strength: float | None = None) -> Row:
        spread = torch.randn(questions, generator=generator) * (0 if kind == "base" else 6)
        length = (lengths * (1 + share) + spread).clamp(min=1).round()
        tokens = (255.0,) * windows
        noise = 1 + 0.3 * torch.randn(windows, generator=generator)
        loss = [(3.47 + kl / 3 * float(x)) * 255 for x in noise]
        samples = {
            "KL": Sample(tuple(255 * kl * float(x) for x in noise), tokens),
            "perplexity": Sample(tuple(loss), tokens),
            "length": Sample(tuple(length.tolist())),
            "preferred": Sample(tuple((torch.rand(questions, generator=generator) < 0.4 - share).float().tolist())),
            "repetition": Sample(tuple((0.05 * torch.rand(questions, generator=generator)).tolist())),
        }
        said = "An egg takes eight minutes in boiling water." if kind in ("knee", "edit") else "Great question! " * 60
        answers = tuple(f"{said} ({i})" if i % 3 else f"Yes. ({i})" for i in range(questions))
        return Row(name, kind, samples, note, strength, answers, 1.0)

    rows = [
        row("base", "base", 0, 0),
        row("trial 12", "knee", edit, 0.048, "component"),
        row("trial 9", "front", edit / 2, 0.012, "steering"),
        row("trial 31", "front", edit * 1.3, 0.11, "steering"),
        *(
            row(f"steering × {s:g}", "steering", max(-0.3 * s, -0.85), 0.02 * s**2, "activation steering", s)
            for s in strengths
        ),
        *(row(f"random direction {i + 1}", "random", random, 0.048, "at equal KL") for i in range(3)),
        row("shuffled labels 1", "shuffled", -0.01, 0.047, "at equal KL"),
        row("sign flipped", "flipped", 0.3, 0.052, "at equal ‖ΔW‖"),
        row("whole matrices", "whole", -0.3, 0.049, "at equal KL"),
        row("ablation", "ablation", -0.1, 0.048, "at equal KL"),
    ]
    context = {"split": "report", "split_seed": 0, "questions": questions, "max_new_tokens": 160}
    prompts = tuple(f"How do I boil an egg, in {i} steps?" for i in range(questions))
    return Evaluation(METRICS, tuple(rows), context, prompts)


def make_trials(count: int = 24) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trials and settings of a study whose knee is trial 12."""
    trials: list[dict[str, Any]] = []
    for number in range(count):
        kl = 0.004 * 1.2**number
        value = 90 - 60 * (1 - 1 / (1 + 12 * kl)) + 7 * (number % 3)
        measured = number % 7 != 6
        trials.append(
            {
                "number": number,
                "params": {"method": "steering", "kl": kl, "first_layer": number % 5},
                "state": "complete" if measured else "pruned",
                "attribute": {"value": value, "low": value - 6, "high": value + 6, "count": 40} if measured else None,
                "utility": {"value": kl, "low": 0.9 * kl, "high": 1.1 * kl, "count": 16} if measured else None,
                "kl": kl,
                "front": number % 3 == 0 and measured,
                "knee": number == 12,
            }
        )
    given = {
        "attribute": {"name": "length", "goal": "less"},
        "utility": {"name": "KL", "goal": "less"},
        "seed": 3,
        "split_seed": 0,
        "sampler": "TPE",
        "trials": count,
    }
    return trials, given


def make_report(layers: int = 3, heads: int = 4, neurons: int = 16, questions: int = 24, **changed: Any) -> Report:
    """Everything a report can have."""
    trials, study = make_trials()
    receipt = {
        "target": "lora",
        "exactness": "exact",
        "notes": [],
        "versions": {"steer2edit": "0.1.0", "torch": "2.13"},
    }
    whole = Report(
        make_plan(layers, heads, neurons),
        make_evaluation(questions),
        receipt,
        trials,
        study,
        "steer2edit tune model --behavior concise",
    )
    return dataclasses.replace(whole, **changed)


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; keeps ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def headings(self) -> set[str]:
        return {str(attributes["id"]) for tag, attributes in self.tags if tag == "section"}


@pytest.fixture(scope="module")
def whole() -> str:
    return render_page(make_report())


def test_the_page_is_balanced_and_says_what_it_is(whole: str) -> None:
    page = Page(whole)
    assert whole.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in page.tags
    names = {attributes.get("name") for tag, attributes in page.tags if tag == "meta"}
    assert {"viewport", "color-scheme"} <= names
    assert page.headings == {"tradeoff", "candidates", "answers", "changed", "selection", "load", "reproduce", "limits"}
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == 4 and all(a["role"] == "img" and a["aria-label"] for a in drawn)


def test_nothing_is_loaded_and_nothing_runs(whole: str) -> None:
    page = Page(whole)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert not re.search(r"https?:|//", value or "") or name in ("d", "aria-label"), (tag, name, value)
            if name in ("src", "href", "xlink:href"):
                assert str(value).startswith(("#", "data:image/png;base64,"))
    assert "@import" not in whole and not re.search(r"url\((?!#)", whole)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_every_reference_is_met(whole: str) -> None:
    page = Page(whole)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', whole)
    assert used and set(used) <= set(ids)


def test_the_same_report_gives_the_same_bytes(whole: str) -> None:
    assert render_page(make_report()) == whole


def test_text_of_figures_follows_the_page(whole: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", whole, re.S)
    assert all("currentColor" in one and figures.INK not in one and "#000000" not in one for one in drawn)
    styles = re.findall(r'<text[^>]*style="([^"]*)"', "".join(drawn))
    assert styles and all("fill: currentColor" in style and "font-family: inherit" in style for style in styles)


@pytest.mark.parametrize("colour", [BLUE, ORANGE, GREY])
def test_data_is_seen_on_white_and_on_black(colour: str) -> None:
    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert 1.05 / (luminance(colour) + 0.05) >= 3
    assert (luminance(colour) + 0.05) / (luminance("#111111") + 0.05) >= 3


HOSTILE = [
    '<script>alert("1")</script>',
    "'\"><img src=x onerror=alert(1)>",
    "]]></style>--><b>&amp;",
    "$x^{$_^",
    "\ud800\x00\x1b\n",
]


def hostile_report(text: str) -> Report:
    """A report in which every name and text that comes from data is ``text``."""
    plan = make_plan(2, 2, 4, name=text)
    plan = dataclasses.replace(
        plan,
        base=Base(text, text, text),
        # a safetensors header is UTF-8: no tensor's name holds half a character
        edits=(dataclasses.replace(plan.edits[0], tensor=text.encode("utf-8", "replace").decode()),),
        method={"name": text, text: text, "nested": [{text: text}]},
        data={**plan.data, "data": text, "examples": {text: text}, "system": text},
    )
    metrics = (Metric(f"{text}u", "utility", "less", text), Metric(f"{text}a", "attribute", "more", text))
    samples = {metric.name: Sample((1.0, 2.0, 4.0)) for metric in metrics}
    rows = [
        Row(f"{text}{i}", kind, samples, text, 1.0, (text + str(i),) * 3)
        for i, kind in enumerate(("base", "edit", "random", "steering", text))
    ]
    evaluation = Evaluation(metrics, tuple(rows), {text: text, "split": text}, (text,) * 3)
    trials, study = make_trials(6)
    study = {**study, "sampler": text, text: text, "attribute": {"name": text, "goal": text}}
    trials = [
        {**trial, "params": {text: text}, "state": trial["state"] if i else text} for i, trial in enumerate(trials)
    ]
    receipt = {"target": text, "exactness": text, "notes": [text], "versions": {text: text}}
    return Report(plan, evaluation, receipt, trials, study, text)


@pytest.mark.parametrize("text", [*HOSTILE, "x" * 3000, "漢字 🥚 ʕ•ᴥ•ʔ"])
def test_whatever_comes_from_data_is_escaped(text: str) -> None:
    written = render_page(hostile_report(text))
    written.encode("utf-8")
    plain = render_page(hostile_report("plain"))
    tags = [tag for tag, _ in Page(written).tags]
    assert sum(tag in ("script", "b", "img") for tag in tags) == 0
    # the text makes no element and no attribute: the page has those that any text gives it
    outside = [tag for tag, _ in Page(re.sub(r"<svg.*?</svg>", "", written, flags=re.S)).tags]
    assert outside == [tag for tag, _ in Page(re.sub(r"<svg.*?</svg>", "", plain, flags=re.S)).tags]
    if text.isprintable() and len(text) < 100:
        assert text in Page(written).said


@given(text=st.text(max_size=30))
@settings(max_examples=15, deadline=None)
def test_any_text_at_all_is_escaped(text: str) -> None:
    report = dataclasses.replace(hostile_report(text), plan=dataclasses.replace(hostile_report(text).plan, scores={}))
    written = render_page(report)
    written.encode("utf-8")
    assert not any(attribute.startswith("on") for _, attributes in Page(written).tags for attribute in attributes)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", written)


def test_verdict_says_what_was_found() -> None:
    said = verdict(make_report())
    assert re.match(r"Length falls by [\d.]+ tokens \[[\d.]+, [\d.]+\] at a KL of 0\.0\d+ nats/token; ", said)
    assert "the best of 3 random directions at equal KL" in said
    assert "not distinguishable" not in said


def test_verdict_says_when_chance_does_the_same() -> None:
    said = verdict(make_report(evaluation=make_evaluation(random=-0.45)))
    assert "not distinguishable from a random direction." in said
    assert "not distinguishable from no change" not in said


def test_verdict_says_when_chance_does_better() -> None:
    assert "a random direction one does better" in verdict(
        make_report(evaluation=make_evaluation(edit=-0.2, random=-0.7))
    )


def test_verdict_says_when_nothing_changed() -> None:
    assert "not distinguishable from no change" in verdict(make_report(evaluation=make_evaluation(edit=0.0)))


def test_verdict_says_when_it_went_the_wrong_way() -> None:
    said = verdict(make_report(evaluation=make_evaluation(edit=0.4)))
    assert said.startswith("Length rises by") and "wrong way" in said


def test_verdict_says_when_chance_was_not_measured() -> None:
    whole = make_evaluation()
    alone = dataclasses.replace(whole, rows=tuple(r for r in whole.rows if r.kind not in ("random", "shuffled")))
    assert "No random direction was measured" in verdict(make_report(evaluation=alone))


def test_values_that_are_not_finite_decide_nothing() -> None:
    whole = make_evaluation()
    broken = [dataclasses.replace(r, samples=_lost(r.samples)) if r.kind != "base" else r for r in whole.rows]
    report = make_report(evaluation=dataclasses.replace(whole, rows=tuple(broken)))
    assert "not distinguishable from no change" in verdict(report)
    assert "not finite" in Page(render_page(report)).said


def _lost(samples: Mapping[str, Sample]) -> dict[str, Sample]:
    return {name: dataclasses.replace(s, values=(float("nan"), *s.values[1:])) for name, s in samples.items()}


def test_sections_vanish_without_data() -> None:
    bare = Report(make_plan())
    page = Page(render_page(bare))
    assert page.headings == {"changed", "load", "reproduce", "limits"}
    assert "was not measured" in page.said and "steer2edit emit PLAN" in page.said
    empty = Page(render_page(Report(EditPlan(Base("m", None, "f"), ()))))
    assert empty.headings == {"changed", "load", "reproduce", "limits"}
    only_base = dataclasses.replace(make_evaluation(), rows=make_evaluation().rows[:1])
    assert "answers" not in Page(render_page(make_report(evaluation=only_base))).headings
    study = make_report(evaluation=None)
    assert {"tradeoff", "selection"} <= Page(render_page(study)).headings


def test_answers_that_differ_come_first_and_long_ones_are_cut() -> None:
    page = Page(render_page(make_report()))
    assert "16 of 24 answers differ. These are the first 6 that do" in page.said
    assert "in 1 steps" in page.said and "in 0 steps" not in page.said
    assert "Great questi …" in page.said
    assert sum(tag == "article" for tag, _ in page.tags) == 6


@pytest.mark.parametrize(
    ("receipt", "expected"),
    [
        ({"target": "lora"}, "PeftModel.from_pretrained"),
        ({"target": "checkpoint"}, 'AutoModelForCausalLM.from_pretrained("path/to/the/folder")'),
        ({"target": "gguf"}, "--to gguf"),
        (None, "--to checkpoint"),
    ],
)
def test_loading_is_told_for_the_target(receipt: dict[str, Any] | None, expected: str) -> None:
    assert expected in Page(render_page(make_report(receipt=receipt))).said


def test_a_report_and_its_figures_are_written(tmp_path: Path) -> None:
    report = make_report()
    written = write_report(report, tmp_path / "new" / "report.html", pngs=True)
    assert [path.name for path in written] == [
        "report.html",
        *(f"report-{n}.png" for n in ("tradeoff", "heads", "neurons", "scores")),
    ]
    assert written[0].read_text(encoding="utf-8") == render_page(report)
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in written[1:])
    (tmp_path / "file").touch()
    with pytest.raises(Steer2EditError, match="cannot write"):
        write_report(report, tmp_path / "file" / "report.html")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize(
    "plan",
    [
        make_plan(),
        make_plan(80, 64, 32),
        make_plan(30, 9, 0),
        make_plan(3, 0, 40, resampled=False),
        make_plan(2, 1, 1, lam=0.0),
    ],
    ids=["both", "deep", "attention", "mlp", "zero"],
)
def test_heatmaps_of_every_shape_are_drawn(plan: EditPlan, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / f"map.{suffix}"
    heatmap(plan, path)
    assert path.stat().st_size > 3000
    drawn = figures.of_plan(plan)
    assert not any("$" in drawing.svg() for drawing in drawn.values())
    assert set(drawn) == {"scores"} | {
        name for role, name in (("attn_out", "heads"), ("mlp_out", "neurons")) if f"{role}.0" in plan.scores
    }


@pytest.mark.parametrize(("strengths", "scale"), [((0.5, 1.0, 2.0), "linear"), ((0.1, 1.0, 8.0), "symlog")])
@pytest.mark.parametrize("rounding", [0.0, 1e-9, -1e-9])
def test_divergences_of_many_sizes_get_a_logarithm(strengths: tuple[float, ...], scale: str, rounding: float) -> None:
    evaluation = make_evaluation(strengths=strengths)
    base = evaluation.rows[0]
    samples = {**base.samples, "KL": Sample((255 * rounding,) * 16, (255.0,) * 16)}
    rows = (dataclasses.replace(base, samples=samples), *evaluation.rows[1:])
    drawing = figures.tradeoff(dataclasses.replace(evaluation, rows=rows))
    assert drawing is not None and drawing.figure.axes[0].get_xscale() == scale


def test_neurons_keep_their_identity() -> None:
    plan = make_plan(2, 0, 40)
    drawing = figures.neurons(plan)
    assert drawing is not None
    named = set(re.findall(r">(\d+)</text>", drawing.svg()))
    for table in plan.scores.values():
        strongest = table.lam.abs().topk(3).indices.tolist()
        assert set(map(str, strongest)) <= named


def test_a_plan_without_scores_has_no_heatmap(tmp_path: Path) -> None:
    with pytest.raises(Steer2EditError, match="no component scores"):
        heatmap(dataclasses.replace(make_plan(), scores={}), tmp_path / "map.png")
    with pytest.raises(Steer2EditError, match="cannot write"):
        heatmap(make_plan(), tmp_path / "map.docx")


def test_plots_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(Steer2EditError, match=re.escape("pip install 'steer2edit[plots]'")):
        render_page(make_report())
