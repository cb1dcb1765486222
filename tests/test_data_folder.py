"""A folder of data: read as it was made, refused where its files are not, and taken whole by every command."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROWS, run
from data_folders import DESCRIBED, QUESTIONS, write_data_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit.capture.statistics import Statistics
from steer2edit.data import data_folder
from steer2edit.data.behavior import Behavior
from steer2edit.data.data_folder import RECEIPT, open_data_folder
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.questions import take
from steer2edit.errors import DataError
from steer2edit.plan import EditPlan

SELECT, REPORT = ({prompt_digest(row["prompt"]) for row in QUESTIONS[part]} for part in ("select", "report"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data") / "here")


def test_each_file_is_used_for_what_it_is_for(folder: Path) -> None:
    found = open_data_folder(folder)
    assert (found.name, found.positive) == ("here", "Say where.")
    assert found.metric == MetricChoice("count", "more", "e", "letters")
    assert len(found.read_pairs()) == 2 * len(ROWS)
    questions = found.read_questions()
    for seed in range(3):
        assert {q.digest for q in take(questions, "select", seed)} == SELECT
        assert {q.digest for q in take(questions, "report", seed)} == REPORT
    behavior = Behavior.from_data(folder)
    assert (behavior.name, behavior.metric) == ("here", found.metric)
    assert behavior.origin == (
        {
            "kind": "folder", "receipt": found.digest, "way": "instructions", "kept": 18, "offered": 20,
            "verdict": "steerable",
        },
    )  # fmt: skip


def test_what_a_receipt_leaves_out_is_absent(tmp_path: Path) -> None:
    path = write_data_folder(tmp_path / "bare", metric=None, made={"way": "sorted"}, rows={}, verdict=None)
    found = open_data_folder(path)
    assert found.metric is None and found.positive is None
    assert found.origin == {"kind": "folder", "receipt": found.digest, "way": "sorted"}


def _without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def _changed(**entries: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        receipt = json.loads((path / RECEIPT).read_text())
        (path / RECEIPT).write_text(json.dumps({**receipt, **entries}))

    return change


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no receipt": (_without(RECEIPT), "is a folder without data.json"),
    "a broken receipt": (lambda path: (path / RECEIPT).write_text('{"format":'), "cannot read"),
    "a list": (lambda path: (path / RECEIPT).write_text("[]"), "names no format, expected 'steer2edit.data.1'"),
    "another format": (_changed(format="steer2edit.data.9"), 'has the format "steer2edit.data.9"'),
    "a file that is missing": (_without("select.jsonl"), "select.jsonl is missing"),
    "a file that is a folder": (
        lambda path: ((path / "report.jsonl").unlink(), (path / "report.jsonl").mkdir()),
        "report.jsonl is missing",
    ),
    "a file that was changed": (
        lambda path: (path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n"),
        "train.jsonl is not what data.json says",
    ),
    "no hashes": (_changed(files={}), "data.json.files.train.jsonl is missing"),
    "no name": (_changed(behavior={}), "data.json.behavior.name is missing"),
    "an unknown metric": (_changed(metric={"name": "speed", "goal": "less"}), 'data.json.metric.name is "speed"'),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_not_as_it_was_made_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = write_data_folder(tmp_path / "data")
    damage(path)
    with pytest.raises(DataError) as caught:
        open_data_folder(path)
    assert message in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    path = write_data_folder(tmp_path / "data")
    (path / "train.jsonl").write_text("{}\n")
    (path / "report.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        open_data_folder(path)
    assert "train.jsonl is not what" in str(caught.value) and "report.jsonl is missing" in str(caught.value)


@pytest.mark.parametrize(("part", "other"), [("select", "train"), ("report", "train"), ("report", "select")])
def test_files_that_share_a_prompt_are_refused(tmp_path: Path, part: str, other: str) -> None:
    twice = (ROWS if other == "train" else QUESTIONS[other])[0]
    rows = [*QUESTIONS[part], {**twice, "prompt": f" {twice['prompt'].upper()}"}]
    path = write_data_folder(tmp_path / "data", **{part: rows})
    with pytest.raises(DataError, match="share prompts") as caught:
        open_data_folder(path)
    assert f"{other}.jsonl line 1 and {part}.jsonl line 9" in str(caught.value)


def test_a_compile_takes_the_folder_and_nothing_else(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("compile", tiny_llama, "--data", folder, "--to", "lora", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    evaluation = json.loads(result.stdout)["evaluation"]
    own = next(metric for metric in evaluation["metrics"] if metric["role"] == "attribute")
    assert (own["name"], own["own"]) == ("letters", True)
    assert evaluation["context"]["questions"] == len(REPORT)
    assert "instructed" in {row["kind"] for row in evaluation["rows"]}
    plan = EditPlan.load(out / "steer2edit" / "plan.safetensors")
    assert plan.data["origin"] == [open_data_folder(folder).origin]
    assert set(plan.seen) == {prompt_digest(row["prompt"]) for row in ROWS}
    page = (out / "steer2edit" / "report.html").read_text()
    assert "made by steer2edit data (way: instructions), 18 of 20 rows kept, verdict: steerable" in page
    assert all(html.escape(row["positive"]) in page for row in ROWS[:8])
    # what is published holds digests of the data and no text
    public = (out / "README.md").read_text() + (out / "steer2edit.json").read_text()
    texts = [DESCRIBED["behavior"]["description"], *DESCRIBED["made"]["positive"], *(row["prompt"] for row in ROWS)]
    assert not any(text in public for text in texts)
    shown = run("show", out)
    assert "made by steer2edit data" in shown.stdout
    again = run("report", out, "--data", folder, "-o", tmp_path / "page.html")
    assert again.exit_code == 0 and html.escape(ROWS[0]["positive"]) in (tmp_path / "page.html").read_text()
    other = run("report", out, "--data", "concise", "-o", tmp_path / "other.html")
    assert other.exit_code == 2 and "made of other data" in other.stderr


def test_other_commands_take_the_folder_too(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    stats, plan = tmp_path / "a.stats.safetensors", tmp_path / "a.plan.safetensors"
    assert run("capture", tiny_llama, "--data", folder, "--out", stats).exit_code == 0
    assert Statistics.load(stats).examples["positive"] == len(ROWS)
    arguments = ("--stats", stats, "--strength", "0.5", "--all-components", "-o", plan)
    assert run("plan", tiny_llama, *arguments).exit_code == 0
    asked = ("--utility", "none", "--max-new-tokens", "4", "--json")
    found = run("eval", tiny_llama, plan, "--data", folder, *asked)
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["context"]["questions"] == len(REPORT)
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"who {i}"}) + "\n" for i in range(12)))
    found = run("eval", tiny_llama, plan, "--data", folder, "--eval", own, *asked)
    assert found.exit_code == 0, found.stderr
    assert 0 < json.loads(found.stdout)["context"]["questions"] < 12
    found = run("eval", tiny_llama, plan, "--data", tmp_path, *asked)
    assert found.exit_code == 2 and "without data.json" in found.stderr


def test_an_aim_is_reached_on_the_questions_for_selection(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ("--data", folder, "--aim", "calibrated margin=0.002", "--no-report", "--all-components")
    result = run("compile", tiny_llama, *arguments, "--to", "lora", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    plan = EditPlan.load(tmp_path / "out" / "steer2edit" / "plan.safetensors")
    assert set(plan.measured.selected_on) == SELECT


def test_a_search_chooses_on_the_folders_questions_by_its_metric(
    folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "neutral.txt").write_text("the old cat sees a small bird and the river runs . " * 30)
    result = run(
        "tune", tiny_llama, "--data", folder, "--utility", "none", "--neutral", tmp_path / "neutral.txt", "--trials", 3,
        "--max-new-tokens", 4, "--allow-broken", "--no-report", "--kl-range", "0.005,0.1", "-o", tmp_path / "study", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert settings["attribute"] == {"name": "letters", "goal": "more"}
    assert settings["selected_on"] == hashlib.sha256(" ".join(sorted(SELECT)).encode()).hexdigest()


@settings(deadline=None, max_examples=60)
@given(
    key=st.sampled_from(["behavior", "metric", "made", "rows", "verdict", "files"]),
    inner=st.sampled_from(["name", "positive", "kept", "word", "train.jsonl", "goal"]),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=2),
    whole=st.booleans(),
)
def test_whatever_a_receipt_holds_is_read_or_named(
    folder: Path, key: str, inner: str, value: object, whole: bool
) -> None:
    receipt = json.loads((folder / RECEIPT).read_text())
    changed = {**receipt, key: value if whole else {**receipt[key], inner: value}}
    with mock.patch.object(data_folder, "_receipt", return_value=(changed, "0" * 64)):
        problem = "cannot be used as a folder of data"
        try:
            assert open_data_folder(folder).origin["kind"] == "folder"
        except DataError as error:
            problem = str(error)
    assert "cannot be used as a folder of data" in problem
