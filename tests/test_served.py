"""What a server serves is measured by its answers: as in this process where it runs the same model, and no more is claimed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import load_talker, run
from loopback_api import Api, serving

from steer2edit.engines.agreement import labelled_answers
from steer2edit.engines.engine import Request, Sampling, written
from steer2edit.engines.judge import coherence_request, trait_request
from steer2edit.engines.server_client import ServerClient
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.runtime.model import LoadedModel

pytest.importorskip("openai")

SOON = {"retry-after-ms": "1"}
BOTH = {"positive": "a thing", "negative": "no thing", "choices": ["red", "blue"], "answer": 0}
QUESTIONS = [{"prompt": f"What is thing {n}?", **BOTH} for n in range(24)]
SMALL = ("--utility", "none", "--max-new-tokens", "12", "--pattern", "e")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_talker(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def folder(talker: LoadedModel) -> Path:
    assert talker.folder is not None
    return talker.folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Api]]:
    with serving(monkeypatch) as serve:
        yield serve


def by(loaded: LoadedModel) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A server's messages, written by a model in this process, with the end token counted as vLLM counts it."""
    lock, engine = threading.Lock(), TransformersEngine(loaded)

    def message(body: dict[str, Any]) -> dict[str, Any]:
        asked = Request(body["messages"][-1]["content"])
        with lock:
            (answer,) = written(engine, [asked], Sampling(body["max_tokens"]))
        usage = {"completion_tokens": answer.tokens + answer.ended}
        return {"content": answer.text, "finish_reason": "stop" if answer.ended else "length", "usage": usage}

    return message


def word(body: dict[str, Any]) -> dict[str, Any]:
    """The model's name, as often as the name has letters."""
    return {"content": " ".join([body["model"]] * len(body["model"]))}


def result_of(*arguments: Any) -> dict[str, Any]:
    done = run("eval", *arguments, *SMALL, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "stderr": done.stderr}


def numbers(found: dict[str, Any], row: int = 0) -> dict[str, Any]:
    return {name: (one["value"], one["low"], one["high"]) for name, one in found["rows"][row]["metrics"].items()}


def test_the_numbers_are_those_of_the_model_in_this_process(
    serve: Callable[..., Api], folder: Path, talker: LoadedModel, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer2edit.runtime.model.load_model", lambda *_: talker)
    here = result_of(folder, "--eval", questions)
    monkeypatch.setattr("steer2edit.runtime.model.load_model", None)  # nothing is loaded now
    api = serve(message=by(talker))
    there = result_of(folder, "--eval", questions, "--server", api.url)
    measured = numbers(there)
    assert measured.keys() == {"length", "/e/", "repetition", "loops", "empty", "other language"}
    # tokens that a text is split into need not be those that the model chose: of a random model they are not
    del measured["repetition"], measured["loops"]
    assert measured == {name: numbers(here)[name] for name in measured}
    assert 0 < measured["length"][0] < 12
    left_out = set(numbers(here)) - set(numbers(there))
    assert {"KL on prose", "perplexity", "margin", "preferred", "MC1"} <= left_out
    assert left_out <= set(there["context"]["not_measured"])
    assert all(name in there["stderr"] for name in left_out)
    assert there["context"]["lengths"] == {"base": "the server"}


def test_names_are_compared_with_the_base_though_every_fifth_request_fails(
    serve: Callable[..., Api], folder: Path, questions: Path, tmp_path: Path
) -> None:
    busy = (503, SOON, b'{"error": {"message": "busy"}}')
    state: dict[str, Any] = {"models": ["plain", "blunt"], "message": word, "usage": None}
    apis = [serve(**state), serve(**state, fault=lambda n: busy if n % 5 == 4 else None)]
    out = tmp_path / "served.json"
    asked = ("--eval", questions, "--server-model", "plain", "--served", "short=blunt", "--told", "Be brief.")
    sound, failing = (result_of(folder, *asked, "--server", api.url, "-o", out, "--force") for api in apis)
    assert [row["name"] for row in failing["rows"]] == ["base", "short", "instruction", "short and instruction"]
    for number in range(4):
        assert numbers(failing, number) == numbers(sound, number)
    assert "requests were sent again" in failing["stderr"] and "sent again" not in sound["stderr"]
    # no e in either name, and no interval around what is the same in every answer
    change = sound["rows"][1]["metrics"]["/e/"]["change"]
    assert (change["value"], change["low"], change["high"]) == (0.0, 0.0, 0.0)
    # the server counts no tokens: the tokenizer does, and it is said
    assert set(sound["context"]["lengths"].values()) == {"the model's tokenizer"}
    assert "counted by the model's tokenizer" in sound["stderr"]
    bodies = [body for body in apis[0].asked if body["messages"][0]["role"] == "system"]
    assert {(body["model"], body["messages"][0]["content"]) for body in bodies} == {
        ("plain", "Be brief."),
        ("blunt", "Be brief."),
    }
    assert Evaluation.load(out).rows[1].answers[0] == "blunt blunt blunt blunt blunt"
    table = run("eval", folder, *asked, "--server", apis[0].url, *SMALL)
    assert "Not measured: KL in chat, KL on prose, perplexity, margin" in table.stdout
    assert f"Answers by {apis[0].url}/v1" in table.stdout and "short" in table.stdout


def test_another_server_and_an_adapter_that_the_request_chooses(
    serve: Callable[..., Api], folder: Path, questions: Path
) -> None:
    api = serve(owner="llamacpp", adapters=["/a/other.gguf", "/b/concise.gguf"])
    second = serve(models=["x", "y"])
    found = result_of(
        folder, "--eval", questions, "--server", api.url, "--served", "concise.gguf", "--served", f"two={second.url}#y",
        "--limit", "3",
    )  # fmt: skip
    assert [row["name"] for row in found["rows"]] == ["base", "concise.gguf", "two"]
    assert [body["lora"] for body in api.asked] == [[]] * 3 + [[{"id": 1, "scale": 1.0}]] * 3
    assert {body["model"] for body in second.asked} == {"y"} and "lora" not in second.asked[0]
    assert found["context"]["served"]["concise.gguf"]["adapter"] == "concise.gguf"


def test_the_model_judges_under_the_bases_name(serve: Callable[..., Api], folder: Path, questions: Path) -> None:
    api = serve(models=["plain", "blunt"], top=[("Yes", -0.7), ("No", -0.8)])
    found = result_of(
        folder, "--eval", questions, "--server", api.url, "--server-model", "plain", "--served", "blunt", "--limit", "2",
        "--judge", "self", "--rubric", "It is short.",
    )  # fmt: skip
    assert found["context"]["judge"]["shows"]["trusted"] is False
    assert {body["model"] for body in api.asked if body.get("logprobs")} == {"plain"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapter", "--server", "http://one"), "adapter is a file, and with --server nothing is loaded here"),
        (("--server", "http://one", "--baselines"), "--baselines: this needs the model's weights"),
        (("--server", "http://one", "--strengths", "1", "--dtype", "float32"), "--strengths, --dtype: this needs"),
        (("--server", "http://one", "--lm-eval", "x"), "--lm-eval: this needs"),
        (("--server", "http://one", "--neutral", "x"), "--neutral: this needs"),
        (("--server", "http://one", "--served", "a", "--served", "a=b"), "two rows would be called 'a'"),
        (("--server", "http://one", "--served", "base"), "two rows would be called 'base'"),
        (("--server", "http://one", "--served", "=x"), "is not of the form"),
        (("--server", "http://one", "--engine", "vllm"), "both name what writes the answers"),
        (("--served", "a"), "give --server URL too"),
        (("--server-model", "a"), "give --server URL too"),
        (("--server", "http://127.0.0.1:9"), "cannot be reached"),
        (("--server", "http://127.0.0.1:9", "--repetition-penalty", "1.1"), "set where the server is started"),
    ],
)
def test_what_a_server_cannot_do_is_refused(
    folder: Path, questions: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("eval", folder, *arguments, "--eval", questions)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output


def test_names_that_a_server_does_not_know(serve: Callable[..., Api], folder: Path, questions: Path) -> None:
    api = serve(models=["plain", "blunt"])
    known = ("--server-model", "plain", "--served")
    for arguments, message in (
        ((), "serves 2 models: - plain - blunt name the model with --server-model"),
        ((*known, "formal"), 'does not serve "formal"; it serves: - plain - blunt'),
        ((*known, f"two={api.url}"), f"name the model with --served two={api.url}#NAME"),
    ):
        result = run("eval", folder, "--server", api.url, *arguments, "--eval", questions)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not api.asked


def test_the_base_under_another_label_is_told_and_a_folder_that_is_not_there(
    serve: Callable[..., Api], folder: Path, questions: Path
) -> None:
    api = serve(models=["plain", "blunt"])
    asked = ("--eval", questions, "--server", api.url, "--server-model", "plain", "--limit", "2")
    found = result_of(folder, *asked, "--served", f"again={api.url}#plain", "--served", "blunt")
    assert "again is the base itself: plain of" in found["stderr"] and "blunt is the base" not in found["stderr"]
    result = run("eval", folder / "nowhere", *asked)
    assert result.exit_code == 2 and "nowhere does not exist; expected a model's folder" in result.stderr


def test_two_system_messages_are_refused(serve: Callable[..., Api], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chats = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Why {n}?"}] for n in range(12)]
    path.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    api = serve()
    result = run("eval", folder, "--server", api.url, "--eval", path, "--system", "Be brief.", "--utility", "none")
    assert result.exit_code == 2 and "has a system message of its own" in " ".join(result.stderr.split())
    assert "chats.jsonl" in result.stderr and not api.asked


# killed runs


def compared(out: Path) -> dict[str, Any]:
    """All that an evaluation's file says, but for the seconds that it took."""
    found: dict[str, Any] = json.loads(out.read_text())
    for row in found["rows"]:
        row.pop("seconds")
    return found


def judging(body: dict[str, Any]) -> list[tuple[str, float]]:
    """Yes to what people labelled so, and to what the model blunt wrote."""
    asked = body["messages"][-1]["content"]
    good = {
        request.prompt
        for one in labelled_answers()
        for request, label in (
            (trait_request(one.trait, one.prompt, one.answer), one.shows),
            (coherence_request(one.prompt, one.answer), one.coherent),
        )
        if label
    }
    return [("Yes" if asked in good or "blunt" in asked else "No", -0.1), ("I", -3.0)]


@pytest.mark.parametrize(("judge", "counts"), [((), True), (("--judge", "self", "--rubric", "It is short."), False)])
def test_an_evaluation_that_is_killed_twice_is_that_of_an_unbroken_run(
    serve: Callable[..., Api],
    folder: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: tuple[str, ...],
    counts: bool,
) -> None:
    usage = {"completion_tokens": 7} if counts else None
    api = serve(models=["plain", "blunt"], message=word, usage=usage, top=judging)
    asked = ("--eval", questions, "--server", api.url, "--server-model", "plain", "--served", "blunt", *judge)
    asked = (*asked, "--requests", "2")
    whole = tmp_path / "whole.json"
    names = {metric["name"] for metric in result_of(folder, *asked, "-o", whole)["metrics"]}
    assert ({"judged", "coherent"} <= names) == bool(judge)
    unbroken, api.asked[:] = len(api.asked), []
    out, journal = tmp_path / "broken.json", tmp_path / "broken.json.journal.jsonl"
    each = ServerClient.each

    def killed(client: ServerClient, work: Any, items: Any) -> Iterator[tuple[int, Any]]:
        with closing(each(client, work, items)) as answers:
            for found in answers:
                if len(api.asked) > unbroken // 2:
                    raise KeyboardInterrupt
                yield found

    with monkeypatch.context() as patched:
        patched.setattr(ServerClient, "each", killed)
        assert run("eval", folder, *asked, *SMALL, "-o", out).exit_code == 1
    assert journal.exists() and not out.exists()
    # then the server itself fails for good
    seen = len(api.asked)
    api.fault = lambda number: (400, {}, b'{"error": {"message": "no more"}}') if number == seen + 5 else None
    failed = run("eval", folder, *asked, *SMALL, "-o", out)
    assert failed.exit_code == 2 and "no more" in failed.stderr and "which are not asked for again" in failed.stderr
    # the last line may be half written
    with journal.open("ab") as file:
        file.write(b'{"key": "12')
    api.fault = lambda number: None
    result_of(folder, *asked, "-o", out)
    assert compared(out) == compared(whole)
    # each kill lost what was under way or not yet written down: of a judge, a batch of 32 at most
    assert len(api.asked) <= unbroken + 2 * (6 + 32 * bool(judge))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "whole.json"]


def test_what_is_served_later_is_asked_anew_and_other_settings_take_up_the_answers(
    serve: Callable[..., Api], folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = serve(models=["plain", "blunt"], message=word)
    asked = ("--eval", questions, "--server", api.url, "--server-model", "plain", "--limit", "4")
    out = tmp_path / "one.json"
    result_of(folder, *asked, "-o", out)
    result_of(folder, *asked, "-o", out, "--force")
    assert len(api.asked) == 2 * 4
    # a run that fails leaves its answers to one with another candidate
    api.fault = lambda number: (400, {}, b"{}") if number == 8 + 6 else None
    assert (
        run("eval", folder, *asked, *SMALL, "--served", "blunt", "--requests", "1", "-o", out, "--force").exit_code == 2
    )
    api.fault = lambda number: None
    result_of(folder, *asked, "-o", out, "--force", "--told", "Be brief.")
    asked_plain = [body for body in api.asked if body["model"] == "plain"]
    assert len([body for body in asked_plain if body["messages"][0]["role"] == "user"]) == 3 * 4
    assert len(asked_plain) == 4 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_a_file_in_the_journals_place_is_left_alone_and_a_run_that_asks_nothing_leaves_none(
    folder: Path, questions: Path, tmp_path: Path
) -> None:
    asked = ("--eval", questions, "--server", "http://127.0.0.1:9", "-o", tmp_path / "x.json")
    assert run("eval", folder, *asked).exit_code == 2
    assert not list(tmp_path.iterdir())
    mine = tmp_path / "x.json.journal.jsonl"
    mine.write_text("mine\n")
    result = run("eval", folder, *asked)
    assert result.exit_code == 2 and "is not a journal of steer2edit: give -o another file" in " ".join(
        result.stderr.split()
    )
    assert mine.read_text() == "mine\n"
