"""The report: it says what the numbers say, escapes whatever comes from data, and needs nothing from outside."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_reports import HOSTILE, hostile_report, make_evaluation, make_plan, make_report

from steer2edit.bootstrap import LEAST_DRAWS, estimate
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.plan import Base, EditPlan, Structure, merge
from steer2edit.report.drawing import INK
from steer2edit.report.load import read_report
from steer2edit.report.page import Report, render_page, verdict, write_report
from steer2edit.report.plan_text import plan_line
from steer2edit.report.verdict import direction

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "hr", "img", "link"}


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
    assert all("currentColor" in one and INK not in one and "#000000" not in one for one in drawn)
    styles = re.findall(r'<text[^>]*style="([^"]*)"', "".join(drawn))
    assert styles and all("fill: currentColor" in style and "font-family: inherit" in style for style in styles)


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
    assert "beyond random directions (mean of 3): −" in said
    assert "That is more than whole matrices, random directions (mean of 3) and shuffled labels (one) give." in said
    assert "not distinguishable" not in said


def test_verdict_names_activation_steering_where_it_costs_as_much() -> None:
    whole = make_evaluation()
    edit = next(row for row in whole.rows if row.kind in ("knee", "edit"))
    rest = tuple(row for row in whole.rows if row.kind != "steering")
    steering = next(row for row in whole.rows if row.kind == "steering")
    for share, named in ((1.05, True), (3.0, False)):
        kl = edit.samples["KL"]
        dearer = dataclasses.replace(kl, values=tuple(share * value for value in kl.values))
        row = dataclasses.replace(steering, note="at equal KL", samples={**steering.samples, "KL": dearer})
        said = verdict(make_report(evaluation=dataclasses.replace(whole, rows=(*rest, row))))
        assert ("beyond activation steering: −" in said) == named


def test_a_study_without_a_report_shows_its_front_and_says_where_it_was_chosen() -> None:
    whole = make_report(evaluation=None)
    plan = dataclasses.replace(whole.plan, measured=dataclasses.replace(whole.plan.measured, selected_on=("0" * 16,)))
    report = dataclasses.replace(whole, plan=plan)
    assert "chosen on the selection split" in verdict(report)
    page = render_page(report)
    figure = page[page.index("<svg") : page.index("</svg>")]
    assert all(f">{label}<" in figure for label in ("front", "chosen edit", "trials (selection split)"))
    assert "all on the selection split" in page


def test_verdict_says_when_chance_does_the_same() -> None:
    said = verdict(make_report(evaluation=make_evaluation(random=-0.45)))
    assert "not distinguishable from random directions (mean of 3)." in said
    assert "Not steerable here: length differs by" in said
    assert "not distinguishable from no change" not in said


def test_verdict_says_when_chance_does_better() -> None:
    said = verdict(make_report(evaluation=make_evaluation(edit=-0.2, random=-0.7)))
    assert "The edit does worse than random directions (mean of 3)" in said
    assert said.endswith("that is the wrong direction.")


def test_verdict_says_when_nothing_changed() -> None:
    assert "not distinguishable from no change" in verdict(make_report(evaluation=make_evaluation(edit=0.0)))


def test_verdict_says_when_it_went_the_wrong_way() -> None:
    said = verdict(make_report(evaluation=make_evaluation(edit=0.4)))
    assert said.startswith("Length rises by") and "wrong direction" in said


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


def test_scores_that_were_not_resampled_are_shown_without_intervals() -> None:
    said = Page(render_page(make_report(plan=make_plan(resampled=False)))).said
    assert "Strongest heads by |λ|" in said and "Edited neurons" in said
    for word in ("not certain", "stable", "Intervals of g", "one random shuffle"):
        assert word not in said


def test_a_merged_plan_names_the_plans_that_it_is_made_of(tmp_path: Path) -> None:
    first, second = make_plan(), make_plan(lam=2.0)
    inner = merge([first, second], [1.0, 0.5])
    path = tmp_path / "merged.plan.safetensors"
    merge([first, inner], [1.0, -0.25]).save(path)
    page = Page(render_page(Report(EditPlan.load(path))))
    assert page.headings == {"changed", "load", "reproduce", "limits"}
    assert page.said.count("merge of 2 plans") == 3
    assert "Merged plans" in page.said and {"1", "2", "2.1", "2.2"} <= set(page.text)
    assert {"−0.25", "0.5", first.hash, inner.hash, second.hash} <= set(page.text)
    assert "rho attn 0.3" in page.said and "Options" not in page.said and "{" not in page.said


def test_an_evaluation_in_the_place_of_its_plan_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "ev.json").write_text("{}")
    with pytest.raises(PlanError, match=r"expected .* a plan.*--evaluation"):
        read_report(tmp_path / "ev.json")


def test_what_a_plan_removes_is_said_beside_what_it_edits() -> None:
    plan = dataclasses.replace(make_plan(), structure=Structure({1: (0, 2)}, layers=(3,)))
    for text in (plan_line(plan), verdict(Report(plan))):
        assert "1 layer removed, 2 experts removed" in text
    assert "removed" not in plan_line(make_plan())


def test_the_knee_is_told_by_its_rule(whole: str) -> None:
    rule = (
        "Trial 12 is the knee: the point of the front that lies farthest over the straight line from the base to the front's "
        "strongest point, both axes scaled to that line."
    )
    assert rule in Page(whole).said


def test_answers_that_differ_come_first_and_long_ones_are_cut() -> None:
    page = Page(render_page(make_report()))
    assert "16 of 24 answers differ. These are the first 6 that do" in page.said
    assert "in 1 steps" in page.said and "in 0 steps" not in page.said
    assert "Great questi …" in page.said
    assert sum(tag == "article" for tag, _ in page.tags) == 6


@pytest.mark.parametrize(
    ("receipt", "expected"),
    [
        ({"target": "lora"}, 'AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")'),
        ({"target": "checkpoint"}, 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")'),
        ({"target": "gguf"}, "llama-server -m base.gguf --lora adapter.gguf"),
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


def test_plots_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(Steer2EditError, match=re.escape("pip install 'steer2edit[plots]'")):
        render_page(make_report())


def test_a_handful_of_questions_decides_nothing() -> None:
    """An interval over one question has no width, and over five no sign test can decide."""
    metric = Metric("length", "attribute", "less", "tokens")
    for count, expected in ((1, 0), (LEAST_DRAWS - 1, 0), (LEAST_DRAWS, 1), (40, 1)):
        assert direction(metric, estimate([-3.0] * count)) == expected
