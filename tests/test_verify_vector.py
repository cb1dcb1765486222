"""verify of a control vector: it does what the plan's mean effect does, or it is not called ok."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, save_tiny
from family_configs import family_config

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import compare_numbers, in_words
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.lowering import Resolved, StreamShift, resolve
from steer2edit.methods import make_plan
from steer2edit.methods.steering import Options
from steer2edit.plan import Base, EditPlan, NewBias
from steer2edit.runtime.model import Runtime
from steer2edit.scoring.scores import Scoring
from steer2edit.targets import gguf_vector

FLOAT32 = Runtime(dtype="float32")


@pytest.fixture(scope="module")
def planned(scoring: Scoring) -> Resolved:
    plan = make_plan(scoring, options=Options(sites="both")).scaled(0.5)
    return resolve(plan, scoring.checkpoint, scoring.spec)


@pytest.fixture(scope="module")
def vector(planned: Resolved, tmp_path_factory: pytest.TempPathFactory) -> StreamShift:
    out = tmp_path_factory.mktemp("vector") / "out"
    emit(planned.plan, planned.checkpoint, planned.spec, "gguf-vector", out)
    return gguf_vector.loadable(planned, out)


def changed(vector: StreamShift, change: Callable[[torch.Tensor], torch.Tensor]) -> StreamShift:
    return StreamShift({layer: change(one) for layer, one in vector.vectors.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: -v, "it goes the wrong way"),
        (lambda v: 50 * v, "too much"),
        (lambda v: 0.02 * v, "next to nothing"),
        (lambda v: v.roll(1), "does something else"),
        (lambda v: 0 * v, "it does not act"),
    ],
    ids=["turned round", "too strong", "too weak", "other coordinates", "nothing"],
)
def test_a_vector_that_does_not_do_what_the_plan_does_on_average_fails(
    planned: Resolved, vector: StreamShift, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    numbers, problems = compare_numbers(planned, changed(vector, change), FLOAT32)
    assert len(problems) == 1 and words in problems[0], numbers


def test_the_verdict_tells_the_mean_effect_from_the_plan(planned: Resolved, vector: StreamShift) -> None:
    numbers, problems = compare_numbers(planned, vector, FLOAT32)
    assert not problems
    mean, whole = numbers["mean_effect"], numbers["from_plan"]
    assert mean["cosine"] > 0.7 and mean["distance"] < 0.8
    # on text that is unlike its data, the plan of a random model does something else
    assert whole["distance"] > 1
    words = in_words(numbers)
    assert f"a cosine of {mean['cosine']:.2f} with that of the mean effect" in words
    assert "further from base + plan than the base is" in words
    numbers["from_plan"] = {"cosine": 0.9, "distance": 0.4}
    assert "further from" not in in_words(numbers)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma4_text", "gpt2", "phi", "granite"])
def test_vectors_of_other_families_act_as_the_mean_effect(
    model_type: str, tmp_path: Path, statistics_of: Callable[..., Any]
) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", family_config(model_type)))
    spec = read_spec(checkpoint)
    statistics = statistics_of(checkpoint.path)
    plan = make_plan(Scoring(checkpoint, spec, statistics), options=Options(sites="both", stable=False)).scaled(0.2)
    emit(plan, checkpoint, spec, "gguf-vector", tmp_path / "out")
    result = verify(tmp_path / "out", checkpoint.path)
    assert result.ok, result.problems
    assert result.numbers["mean_effect"]["cosine"] > 0.4


def test_a_lowering_with_a_wrong_sign_is_found_by_numbers_alone(
    planned: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf_vector.constant_parts

    def turned_round(*arguments: Any) -> dict[int, torch.Tensor]:
        return {layer: -vector for layer, vector in real(*arguments).items()}

    monkeypatch.setattr(gguf_vector, "constant_parts", turned_round)
    emit(planned.plan, planned.checkpoint, planned.spec, "gguf-vector", tmp_path / "out")
    assert verify(tmp_path / "out", planned.checkpoint.path, numbers=False).ok  # the files are what the lowering gives
    result = run("verify", tmp_path / "out", "--base", planned.checkpoint.path)
    assert result.exit_code == 1 and "it goes the wrong way" in result.stdout


def test_constants_in_the_middle_of_a_block_are_compared_where_they_stand(planned: Resolved, tmp_path: Path) -> None:
    spec = planned.spec
    torch.manual_seed(0)
    edits = tuple(NewBias(str(site.new_bias), 0.2 * torch.randn(site.out_features)) for site in spec.sites[::2])
    plan = EditPlan(Base.of(planned.checkpoint), edits)
    emit(plan, planned.checkpoint, spec, "gguf-vector", tmp_path / "out")
    result = verify(tmp_path / "out", planned.checkpoint.path)
    assert result.ok, result.problems
    # the plan is its mean effect
    assert result.numbers["mean_effect"] == pytest.approx(result.numbers["from_plan"], abs=1e-4)
