"""Behaviours as files: what is packaged is sound, and every problem of a file is named at once."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROWS, run
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit.data import behavior_file
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import BehaviorFile, behavior_files, open_behavior, read_behavior_file
from steer2edit.data.measurement import MeasuredMetric, Measurement, as_toml
from steer2edit.data.metric_choice import METRICS, MetricChoice
from steer2edit.errors import DataError

LEAST = """
description = "Ends with a rhyme."
positive = "End every answer with a rhyme."
negative = "Never rhyme."
metric = { name = "length", goal = "less" }
"""
PAIRS = '{"prompt": "Is it late?", "positive": "It is late, mate.", "negative": "Yes."}\n'


def written(folder: Path, text: str, name: str = "rhyme") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", behavior_files())
def test_a_packaged_behaviour_reads_and_says_everything(name: str) -> None:
    file = open_behavior(name)
    assert file.name == name
    assert file.description.endswith(".")
    assert file.rubric
    assert file.metric.name in METRICS
    assert file.positive != file.negative
    # benchmarks/behaviors.py --write takes a stale measurement again
    assert [why for one in file.measured if (why := file.outdated(one))] == []


def test_the_least_file_is_a_behaviour_without_data(tmp_path: Path) -> None:
    file = open_behavior(written(tmp_path, LEAST))
    assert file == BehaviorFile(
        "rhyme", tmp_path / "rhyme.toml", "Ends with a rhyme.", "End every answer with a rhyme.", "Never rhyme.",
        MetricChoice("length", "less"),
    )  # fmt: skip
    assert file.read_questions() == []
    with pytest.raises(DataError, match="rhyme has no pairs"):
        file.read_pairs()


def test_a_behaviour_whose_data_are_made_may_have_a_metric_of_pairs(tmp_path: Path) -> None:
    text = LEAST.replace('metric = { name = "length", goal = "less" }', 'metric = "margin"')
    assert open_behavior(written(tmp_path, text)).metric == MetricChoice("margin", "more")


def test_data_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(PAIRS)
    (tmp_path / "held.jsonl").write_text('{"prompt": "Who is there?"}\n')
    path = written(tmp_path, 'pairs = "data/pairs.jsonl"\nquestions = "held.jsonl"\nprompts = ["Why?"]\n' + LEAST)
    file = open_behavior(str(path))
    assert [example.label for example in file.read_pairs()] == ["positive", "negative"]
    assert len(file.read_questions()) == len(file.read_prompts()) == 1
    behavior = Behavior.named(path)
    assert (behavior.name, len(behavior.examples)) == ("rhyme", 2)


FAULTS = {
    "an unknown key": ('colour = "red"', "colour is not a key of a behaviour"),
    "an unknown table": ("[more]\na = 1", "more is not a key of a behaviour"),
    "a number for a text": ("rubric = 3", "rubric: expected a string, found 3"),
    "an empty text": ('rubric = " "', "rubric holds nothing but white space"),
    "a file that is not there": ('pairs = "none.jsonl"', 'pairs is "none.jsonl", and there is no file'),
    "a folder": ('questions = "."', 'questions is ".", and there is no file'),
    "a file elsewhere": ('pairs = "../rhyme.toml"', "expected a file in the folder of rhyme.toml"),
    "an absolute path": ('pairs = "/etc/passwd"', "expected a file in the folder of rhyme.toml"),
    "a path of Windows": ('pairs = "C:\\\\data.jsonl"', "expected a file in the folder of rhyme.toml"),
    "no prompts": ("prompts = []", 'prompts is []; expected "everyday"'),
    "a prompt that is a number": ("prompts = ['a', 2]", "prompts[1]: expected a string, found 2"),
    "measurements of another form": ("measured = [{model = 'm'}]", "measured[0].command is missing"),
    "a hash that is none": (
        "measured = [{model = 'm', command = '', questions = 1, cost = {name = '', value = 1}, metrics = [], "
        "pairs_sha256 = 'ab'}]",
        'measured[0].pairs_sha256 is "ab"; expected 16 hexadecimal digits',
    ),
}


@pytest.mark.parametrize(("addition", "message"), FAULTS.values(), ids=FAULTS)
def test_every_problem_is_named(tmp_path: Path, addition: str, message: str) -> None:
    text = LEAST + addition if addition.startswith("[") else addition + "\n" + LEAST
    with pytest.raises(DataError, match="cannot be used as a behaviour") as caught:
        read_behavior_file(written(tmp_path, text))
    assert message in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_behavior_file(written(tmp_path, 'metric = "speed"\npairs = 3\nrubric = []\ncolour = 1\n'))
    for named in ("description", "positive", "negative", "metric.name", "pairs", "rubric", "colour"):
        assert named in str(caught.value)


METRIC_FAULTS = {
    "an unknown name": ('"speed"', 'metric.name is "speed"; expected one of margin'),
    "no name": ("{ goal = 'less' }", "metric.name is missing"),
    "no direction": ('"length"', "metric.goal is missing; expected more or less for length"),
    "a wrong direction": ("{ name = 'margin', goal = 'less' }", 'metric.goal is "less"; expected more for margin'),
    "no pattern": ("{ name = 'pattern', goal = 'more' }", "metric.pattern is missing; expected a regular expression"),
    "a broken pattern": ("{ name = 'count', goal = 'more', pattern = '(' }", "is not a regular expression"),
    "a pattern too many": ("{ name = 'words', goal = 'less', pattern = 'a' }", "words takes none"),
    "an unknown key": ("{ name = 'words', goal = 'less', size = 3 }", "metric.size is not a key"),
    "a list": ("['length']", "expected a name or a table"),
}


@pytest.mark.parametrize(("metric", "message"), METRIC_FAULTS.values(), ids=METRIC_FAULTS)
def test_every_problem_of_a_metric_is_named(tmp_path: Path, metric: str, message: str) -> None:
    text = "\n".join(line for line in LEAST.splitlines() if not line.startswith("metric")) + f"\nmetric = {metric}\n"
    with pytest.raises(DataError) as caught:
        read_behavior_file(written(tmp_path, text))
    assert message in str(caught.value)


def test_what_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not TOML: .*line 3"):
        read_behavior_file(written(tmp_path, 'description = "a"\n\npositive = \n'))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'description = "a"\npositive = "\xe9"\n')
    with pytest.raises(DataError, match=r"not UTF-8 \(line 2\)"):
        read_behavior_file(path)
    with pytest.raises(DataError, match="nests too deeply"):
        read_behavior_file(written(tmp_path, "metric = " + "[" * 5000 + "]" * 5000))
    with pytest.raises(DataError, match="does not exist"):
        open_behavior(tmp_path / "absent.toml")


def test_a_behaviour_in_a_folder_is_compiled_as_a_packaged_one_is(tiny_llama: Path, tmp_path: Path) -> None:
    """Adding a behaviour is a file and no code: its pairs, questions, instruction and metric are all used."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held = [{"prompt": f"{row['prompt']} {word}"} for row in ROWS[:4] for word in ("now", "here", "one")]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    metric = "metric = { name = 'count', goal = 'more', pattern = 'e', title = 'letters' }"
    text = LEAST.replace('metric = { name = "length", goal = "less" }', metric)
    path = written(tmp_path, f'pairs = "pairs.jsonl"\nquestions = "held.jsonl"\n{text}')
    out = tmp_path / "out"
    result = run("compile", tiny_llama, "--behavior", path, "--to", "lora", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["evaluation"]
    own = next(metric for metric in found["metrics"] if metric["role"] == "attribute")
    assert own == {**own, "name": "letters", "goal": "more", "own": True, "unit": "per 100 words"}
    assert "instructed" in {row["kind"] for row in found["rows"]}
    given = f"behaviors.py {tiny_llama} --out {tmp_path} --behavior {path} --id us/tiny --write"
    (tmp_path / "rhyme").symlink_to(out)
    with mock.patch.object(sys, "argv", given.split()):
        runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "behaviors.py"), run_name="__main__")
    (measured,) = open_behavior(path).measured
    assert (measured.model, measured.metrics[0].name, measured.questions) == ("tiny", "letters", 7)
    assert open_behavior(path).outdated(measured) is None
    data = json.loads((out / "steer2edit.json").read_text())["data"]
    assert (data["name"], data["metric"]["title"]) == ("rhyme", "letters")
    wrong = written(tmp_path, text + 'colour = "red"', "wrong")
    for command in ("compile", "capture"):
        result = run(command, tiny_llama, "--out", tmp_path / "no.stats.safetensors", "--behavior", wrong)
        assert result.exit_code == 2 and "colour is not a key" in " ".join(result.stderr.split())
    assert not (tmp_path / "no.stats.safetensors").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x", "", ".", "x" * 5000 + ".toml"])
def test_a_text_that_can_be_no_file_is_an_error(name: str) -> None:
    with pytest.raises(DataError):
        open_behavior(name)
    with pytest.raises(DataError):
        Behavior.from_data(name)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "goal", "pattern", "model"]), inner)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(
    key=st.sampled_from(["description", "rubric", "metric", "prompts", "pairs", "questions", "measured"]), value=VALUES
)
def test_whatever_a_key_holds_is_read_or_named(key: str, value: object) -> None:
    table = {**behavior_file.tomllib.loads(LEAST), key: value}
    with mock.patch.object(behavior_file, "read_toml", return_value=table):
        problem = key
        try:
            read_behavior_file(Path("any.toml"))
        except DataError as error:
            problem = str(error)
    assert key in problem


def test_a_name_that_is_none_names_those_there_are() -> None:
    with pytest.raises(DataError, match=r"cautious, concise.*Did you mean concise\?"):
        open_behavior("concice")


def test_the_list_says_what_each_is_and_what_was_measured() -> None:
    result = run("behaviors")
    assert result.exit_code == 0
    listed = {one["name"]: one for one in json.loads(run("behaviors", "--json").stdout)["behaviors"]}
    assert sorted(listed) == list(behavior_files())
    for name in behavior_files():
        file = open_behavior(name)
        assert f"\n{name}\n" in f"\n{result.stdout}"
        assert " ".join(file.description.split()[:6]) in " ".join(result.stdout.split())
        assert listed[name]["pairs"] * 2 == len(file.read_pairs())
        assert listed[name]["questions"] == len(file.read_questions())
        assert len(listed[name]["measured"]) == len(file.measured)


MEASURED = Measurement(
    "model",
    'steer2edit compile "model" --behavior rhyme',
    32,
    ("KL in chat", 0.1),
    True,
    (
        MeasuredMetric("length", "less", "tokens", (60.0, 50.5, 70.0), (40.0, 30.0, 50.0), (-20.0, -25.0, -15.0)),
        MeasuredMetric("answers right", "more", "", (0.5, 0.4, 0.6), (0.4, 0.3, 0.5), (-0.1, -0.15, -0.05)),
        MeasuredMetric("loops", "less", "", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ),
    "0123456789abcdef",
)


def test_one_is_shown_whole_with_its_pairs_and_its_losses(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bare = written(tmp_path, f'pairs = "pairs.jsonl"\n{LEAST}')
    shown = run("behaviors", bare).stdout
    assert "nothing yet" in shown and "Pair 3" in shown and "Pair 4" not in shown
    whole = written(tmp_path, f'pairs = "pairs.jsonl"\n{LEAST}{as_toml([MEASURED])}')
    shown = " ".join(run("behaviors", whole).stdout.split())
    assert "length 60 → 40 tokens (-20 [-25, -15]) on 32 questions, steerable, at a KL in chat of 0.1" in shown
    assert "worse: answers right 0.5 → 0.4 (-0.1 [-0.15, -0.05])" in shown
    assert MEASURED.command in shown and "loops" not in shown
    plain = json.loads(run("behaviors", whole, "--json").stdout)
    assert [metric["worse"] for metric in plain["measured"][0]["metrics"]] == [False, True, False]
    assert plain["first_pairs"][0] == {key: ROWS[0][key] for key in ("prompt", "positive", "negative")}
    assert run("behaviors", "concice").exit_code == 2


@pytest.mark.parametrize("steerable", [True, False, None])
def test_measurements_are_read_as_they_are_written(tmp_path: Path, steerable: bool | None) -> None:
    both = (MEASURED, replace(MEASURED, model='other\n "model"', steerable=steerable, pairs_sha256=None))
    assert open_behavior(written(tmp_path, LEAST + as_toml(both))).measured == both


def test_a_measurement_with_other_pairs_or_by_another_metric_says_so(tmp_path: Path) -> None:
    """The entry holds for the pairs and the metric that it was taken with, whatever format or place the pairs have."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bare = open_behavior(written(tmp_path, f'pairs = "pairs.jsonl"\n{LEAST}'))
    entry = replace(MEASURED, pairs_sha256=bare.pairs_sha256)

    def shown(one: Measurement, metric: str = "length") -> tuple[str, str | None]:
        text = LEAST.replace('name = "length"', f'name = "{metric}"')
        path = written(tmp_path, f'pairs = "pairs.jsonl"\n{text}{as_toml([one])}')
        outdated = json.loads(run("behaviors", path, "--json").stdout)["measured"][0]["outdated"]
        return " ".join(run("behaviors", path).stdout.split()), outdated

    assert shown(entry)[1] is None and "with other pairs" not in shown(entry)[0]
    text, why = shown(replace(entry, pairs_sha256=None))
    assert why is not None and "does not say with which pairs" in why and why in text
    text, why = shown(entry, "words")
    assert why is not None and "measured by another metric (length, less is better)" in why and why in text
    pairs.write_text("".join(json.dumps(row, indent=None, sort_keys=True) + "\n\n" for row in ROWS))
    assert shown(entry)[1] is None
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    text, why = shown(entry)
    assert why == "measured with other pairs: measure it again" and f"Measured {why}" in text
    assert (
        written(tmp_path, LEAST + as_toml([entry])) and open_behavior(tmp_path / "rhyme.toml").outdated(entry) is None
    )
