"""A search finds the front there is, goes on where it was killed, and selects on its own half of the questions alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.data.questions import Question
from steer2edit.errors import PlanError
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.projection import PROJECTION
from steer2edit.evaluation.suite import Suite
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.search.grid import PAPER_GRID, read_grid
from steer2edit.search.journal import Trial
from steer2edit.search.pareto import front_of, knee_of, spread
from steer2edit.search.tune import Search, StudyResult, _stale, plan_of, tune
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts

TEXT = "the old cat sees a small bird and the river runs . " * 12
HELD = [{**row, "prompt": f"{row['prompt']} {word}"} for row in ROWS for word in ("old", "new")]
POINTS = st.dictionaries(st.integers(0, 50), st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20)


@given(POINTS, st.sampled_from(["more", "less"]), st.sampled_from(["more", "less"]))
def test_the_front_is_what_nothing_beats(points: dict[int, tuple[int, int]], one: str, two: str) -> None:
    values = {number: (float(a), float(b)) for number, (a, b) in points.items()}
    signs = tuple(1 if goal == "less" else -1 for goal in (one, two))

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        pairs = [(s * x, s * y) for s, x, y in zip(signs, a, b, strict=True)]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    front = front_of(values, (one, two))
    kept = {values[n] for n in front}
    assert kept == {v for v in values.values() if not any(beats(w, v) for w in values.values())}
    assert len(kept) == len(front)
    assert [signs[1] * values[n][1] for n in front] == sorted(signs[1] * values[n][1] for n in front)


def test_the_knee_is_where_more_begins_to_cost() -> None:
    values = {0: (90.0, 0.01), 1: (50.0, 0.03), 2: (45.0, 0.10), 3: (40.0, 0.30)}
    goals = ("less", "less")
    assert knee_of(values, front_of(values, goals), goals, (100.0, 0.0)) == 1
    assert knee_of({}, [], goals, (0.0, 0.0)) is None
    assert knee_of({7: (1.0, 2.0)}, [7], goals, (5.0, 0.0)) == 7


@given(st.lists(st.integers(), unique=True, max_size=30), st.integers(2, 10))
def test_a_spread_keeps_both_ends(numbers: list[int], count: int) -> None:
    found = list(spread(numbers, count))
    assert len(found) == min(count, len(numbers)) and set(found) <= set(numbers)
    assert not numbers or (found[0], found[-1]) == (numbers[0], numbers[-1])


def test_grids_are_read_and_the_papers_has_125_points() -> None:
    assert len(Search(grid=read_grid(["paper"])).points()) == 125 == len(Search(grid=PAPER_GRID).points())
    assert read_grid(["top-heads=0.1,3", "scale=absolute"]) == {"top_heads": [0.1, 3], "scale": ["absolute"]}
    for text in ("papers", "rho_attn=", "=1"):
        with pytest.raises(PlanError, match="--grid"):
            read_grid([text])


@pytest.fixture(scope="module")
def suite(loaded: LoadedModel) -> Suite:
    questions = [Question(row["prompt"], "test", row["positive"], row["negative"]) for row in HELD]
    return Suite(questions, [], NeutralTexts(NeutralText(loaded, TEXT, window=20)), max_new_tokens=4)


SEARCH = Search(methods=("steering", "component"), trials=14, kl_range=(0.005, 0.1), allow_broken=True)


def points(result: StudyResult) -> list[Any]:
    return [(dict(trial.params), trial.kl, trial.attribute, trial.state) for trial in result.trials]


@pytest.fixture(scope="module")
def unbroken(
    loaded: LoadedModel, scoring: Scoring, suite: Suite, tmp_path_factory: pytest.TempPathFactory
) -> StudyResult:
    return tune(loaded, scoring, suite, SEARCH, storage=tmp_path_factory.mktemp("study") / "journal")


def test_trials_land_near_the_kl_they_aim_at_and_keep_what_was_measured(
    unbroken: StudyResult, loaded: LoadedModel, scoring: Scoring, suite: Suite
) -> None:
    assert len(unbroken.trials) == SEARCH.trials
    aimed = [trial for trial in unbroken.trials if trial.state == "complete"]
    assert len(aimed) > 7
    assert all(0.3 < trial.kl / trial.params["kl"] < 3 for trial in aimed)
    assert unbroken.knee in unbroken.front
    chosen = next(trial for trial in aimed if trial.number == unbroken.front[-1])
    plan = plan_of(scoring, loaded, suite, chosen, SEARCH)
    assert plan.measured.kl == pytest.approx(chosen.kl, rel=1e-6)
    assert set(suite.digests("select")) <= set(plan.seen)
    assert not {q.digest for q in suite.questions("report")} & set(plan.seen)


def test_a_study_that_broke_off_gives_what_an_unbroken_one_gives(
    unbroken: StudyResult, loaded: LoadedModel, scoring: Scoring, suite: Suite, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import steer2edit.search.tune as module

    real, left = module.measure, [9]

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        tune(loaded, scoring, suite, SEARCH, storage=tmp_path / "journal")
    monkeypatch.setattr(module, "measure", real)
    result = tune(loaded, scoring, suite, SEARCH, storage=tmp_path / "journal")
    assert points(result) == points(unbroken)
    assert [unbroken.trials.index(t) for t in unbroken.trials if t.number in unbroken.front] == [
        i for i, t in enumerate(result.trials) if t.number in result.front
    ]


def test_another_seed_or_other_settings(
    unbroken: StudyResult, loaded: LoadedModel, scoring: Scoring, suite: Suite, tmp_path: Path
) -> None:
    from dataclasses import replace

    few = replace(SEARCH, trials=2)
    other = tune(loaded, scoring, suite, replace(few, seed=1), storage=tmp_path / "journal")
    assert points(other) != points(unbroken)[:2]
    with pytest.raises(PlanError, match=r"other settings: seed was 1 and is 0"):
        tune(loaded, scoring, suite, few, storage=tmp_path / "journal")
    more = tune(loaded, scoring, suite, replace(few, seed=1, trials=3), storage=tmp_path / "journal")
    assert points(more)[:2] == points(other) and len(more.trials) == 3
    with pytest.raises(PlanError, match="'beauty' is not measured; there are KL"):
        tune(loaded, scoring, suite, replace(few, attribute="beauty"), storage=tmp_path / "other")


def test_what_breaks_a_metric_is_kept_from_the_front(
    unbroken: StudyResult,
    loaded: LoadedModel,
    scoring: Scoring,
    suite: Suite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    from steer2edit.evaluation import answers

    # every change to the worse counts, on whatever number of questions
    strict = tuple(replace(one, metric=replace(one.metric, tolerance=-0.5)) for one in answers.CHECKS)
    monkeypatch.setattr(answers, "CHECKS", strict)
    monkeypatch.setattr("steer2edit.evaluation.damage.LEAST_DRAWS", 1)
    result = tune(loaded, scoring, suite, replace(SEARCH, trials=4, allow_broken=False), storage=tmp_path / "journal")
    judged = [trial for trial in result.trials if trial.state == "broken"]
    assert judged and all(trial.note.startswith("breaks repetition") for trial in judged)
    assert result.front == () and result.knee is None
    # the same trials, where they are let through
    free = [trial for trial in unbroken.trials if trial.number in {one.number for one in judged}]
    assert {trial.state for trial in free} == {"complete"}


def test_patience_ends_a_search_that_finds_nothing_new() -> None:
    def trial(number: int, value: float, kl: float) -> Trial:
        return Trial(number, {}, "complete", kl, {"value": value}, {"value": kl})

    found = [trial(0, 5.0, 0.1), trial(1, 9.0, 0.2), trial(2, 4.0, 0.3), trial(3, 3.0, 0.4)]
    goals = ("more", "less")
    assert _stale(found, 2, goals)
    assert not _stale(found, 3, goals)  # one of the last three is on the front
    assert not _stale(found, 4, goals) and not _stale(found, None, goals)


def test_a_grid_tries_every_point_once_from_one_read(
    loaded: LoadedModel, scoring: Scoring, suite: Suite, tmp_path: Path
) -> None:
    grid = {"rho_attn": [0.3, 0.5], "rho_mlp": [0.0, 0.4], "alpha": [0.2, 0.9]}
    search = Search(methods=("component",), grid=grid, max_kl=2.0, strength=0.02)
    result = tune(loaded, scoring, suite, search, storage=tmp_path / "journal")
    tried = [tuple(trial.params[key] for key in grid) for trial in result.trials]
    assert sorted(tried) == sorted(tuple(point.values()) for point in search.points())
    assert {trial.state for trial in result.trials} <= {"complete", "empty", "over", "broken"}
    again = tune(loaded, scoring, suite, search, storage=tmp_path / "journal")
    assert points(again) == points(result)


def test_a_sqlite_storage_is_shared_by_workers(
    loaded: LoadedModel, scoring: Scoring, suite: Suite, tmp_path: Path
) -> None:
    pytest.importorskip("sqlalchemy")
    search = Search(trials=3, kl_range=(0.005, 0.05))
    url = f"sqlite:///{tmp_path}/study.db"
    one = tune(loaded, scoring, suite, search, storage=url)
    two = tune(loaded, scoring, suite, search, storage=url)
    assert points(one) == points(two)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "held")}
    for name, rows in (("pairs", ROWS), ("held", HELD)):
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    found["neutral"] = tmp_path / "neutral.txt"
    found["neutral"].write_text(TEXT * 3)
    return found


def arguments(files: dict[str, Path], model: Path, out: Path) -> list[object]:
    return [
        "tune", model, "--data", files["pairs"], "--eval", files["held"], "--utility", "none", "--neutral",
        files["neutral"], "--max-new-tokens", 4, "--kl-range", "0.005,0.1", "--allow-broken", "-o", out,
    ]  # fmt: skip


def test_the_command_searches_reports_and_emits(tiny_llama: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "study"
    result = run(*arguments(files, tiny_llama, out), "--trials", 6, "--to", "lora", "--json")
    assert result.exit_code == 0, result.output
    assert "search: 7 candidates, each on" in result.stderr and "report: at most" in result.stderr
    printed = json.loads(result.stdout)
    assert len(printed["trials"]) == 6 and printed["knee"] in printed["front"]
    knee = EditPlan.load(out / "knee.plan.safetensors")
    evaluation = Evaluation.load(out / "evaluation.json")
    kinds = [row.kind for row in evaluation.rows]
    assert kinds[:2] == ["base", "knee"]
    assert {"steering", "random", "shuffled", "flipped", "whole", "ablation"} <= set(kinds)
    assert evaluation.context["split"] == "report" and knee.measured.selected_on
    verified = run("verify", out / "lora", "--base", tiny_llama)
    assert verified.exit_code == 0, verified.output
    page = run("report", out, "-o", tmp_path / "report.html", "--png")
    assert page.exit_code == 0, page.output
    assert "<svg" in (tmp_path / "report.html").read_text()
    again = run(*arguments(files, tiny_llama, out), "--trials", 6)
    assert again.exit_code == 0 and "knee" in again.stdout
    assert PROJECTION in {metric.name for metric in evaluation.metrics}
    written = run(
        *arguments(files, tiny_llama, tmp_path / "w"), "--trials", 2, "--attribute", PROJECTION, "--no-report", "--json"
    )
    assert written.exit_code == 0, written.output
    assert json.loads(written.stdout)["settings"]["attribute"] == {"name": PROJECTION, "goal": "more"}
    # what it was selected on is refused as a report
    refused = run(
        "eval",
        tiny_llama,
        out / "knee.plan.safetensors",
        "--eval",
        files["held"],
        "--utility",
        "none",
        "--split",
        "select",
    )
    assert refused.exit_code == 2 and "make or choose" in refused.stderr


def test_contrast_data_among_the_questions_is_refused_before_any_work(
    tiny_llama: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    files["held"].write_text(files["pairs"].read_text())
    result = run(*arguments(files, tiny_llama, tmp_path / "study"))
    assert result.exit_code == 2 and "steering vector" in result.stderr
    assert not (tmp_path / "study" / "study.journal").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_search_goes_on_and_finds_the_same_front(
    tiny_llama: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    wanted = 14
    for name in ("whole", "killed"):
        command = [sys.executable, "-m", "steer2edit", *map(str, arguments(files, tiny_llama, tmp_path / name))]
        command += ["--trials", str(wanted), "--no-report"]
        if name == "killed":
            # as many threads as the run that goes on from it: sums in another order round otherwise
            threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
            journal = tmp_path / name / "study.journal"
            until = time.monotonic() + 60
            while time.monotonic() < until and (not journal.exists() or journal.read_text().count('"state"') < 4):
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done = run(*arguments(files, tiny_llama, tmp_path / name), "--trials", 1, "--no-report", "--json")
            assert 1 <= len(json.loads(done.stdout)["trials"]) < wanted
        result = run(*arguments(files, tiny_llama, tmp_path / name), "--trials", wanted, "--no-report")
        assert result.exit_code == 0, result.output
    fronts = []
    for name in ("whole", "killed"):
        trials = json.loads((tmp_path / name / "study.json").read_text())["trials"]
        fronts.append([(trial["params"], trial["kl"], trial["attribute"]) for trial in trials if trial["front"]])
    assert fronts[0] == fronts[1]
