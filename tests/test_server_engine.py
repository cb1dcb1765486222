"""An engine behind a URL: failures are outlived or told, and keys are kept out of everything."""

from __future__ import annotations

import builtins
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loopback_api import Api, serving

from steer2edit.data.prompts import Message
from steer2edit.engines.engine import Answer, Request, Sampling, written
from steer2edit.engines.server_client import ServerClient
from steer2edit.engines.server_engine import ServerEngine
from steer2edit.errors import EngineError
from steer2edit.notices import collected

pytest.importorskip("openai")

REQUESTS = [Request(f"question {number}", "be brief", sample=number % 2) for number in range(12)]
DRAWN = Sampling(max_new_tokens=20, temperature=0.7, top_p=0.9, seed=5)
SOON = {"retry-after-ms": "1"}
KEY = "sk-" + "local-1234567890"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Api]]:
    with serving(monkeypatch) as serve:
        yield serve


def engine_of(api: Api, *, url: str | None = None, client: Any = (), **settings: Any) -> ServerEngine:
    return ServerEngine(ServerClient(url or api.url, **dict(client)), **settings)


def without(api: Api) -> list[Answer]:
    """What a server without a fault answers."""
    api.fault = lambda number: None
    return written(engine_of(api), REQUESTS, DRAWN)


def test_a_request_carries_its_own_seed_and_settings(serve: Callable[..., Api]) -> None:
    api = serve()
    answers = written(engine_of(api), REQUESTS, DRAWN)
    assert [one.text for one in answers] == [f"{r.prompt} | {r.seed(5)} | 0.7" for r in REQUESTS]
    # vLLM counts the end token, which is no part of the answer
    assert answers[0] == Answer(answers[0].text, 6, True)
    body = api.asked[0]
    assert body["model"] == "served" and body["max_tokens"] == 20 and body["top_p"] == 0.9
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    # the server's own habits of sampling are switched off, and the thought is left out
    assert body["top_k"] == 0 and body["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    # the same request in another call, alone: the same seed, so the same answer
    assert written(engine_of(api), REQUESTS[3:4], DRAWN) == answers[3:4]


def test_every_fifth_request_fails(serve: Callable[..., Api]) -> None:
    api = serve(fault=lambda number: (503, SOON, b'{"error": {"message": "busy"}}') if number % 5 == 4 else None)
    with collected() as notices:
        answers = written(engine_of(api), REQUESTS, DRAWN)
    assert answers == without(api)
    (notice,) = notices
    # a request that is sent again may be the fifth again: then it is one request still
    assert re.search(r": (1 request was|[23] requests were) sent again$", notice)


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0.05"}, b"{}"),
        (500, SOON, b"oops"),
        (200, {}, b"<html>a proxy's page</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": '),
    ],
    ids=["slow down", "broken", "not JSON", "no choices", "half of a reply"],
)
def test_what_fails_once_is_asked_again(serve: Callable[..., Api], fault: Any) -> None:
    api = serve(fault=lambda number: fault if number == 1 else None)
    assert written(engine_of(api), REQUESTS, DRAWN) == without(api)


def test_a_cut_connection_is_asked_again(serve: Callable[..., Api], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    api = serve(fault=lambda number: (0, {}, b"") if number == 1 else None)
    assert written(engine_of(api), REQUESTS, DRAWN) == without(api)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((503, SOON, b'{"error": {"message": "no room"}}'), r"status 503: no room \(sent 3 times\)"),
        ((400, {}, b'{"error": {"message": "too long"}}'), "status 400: too long"),
        ((200, {}, b"<html>"), 'it gave "<html>", which is not JSON'),
        ((200, {}, b"[1, 2]"), r"it gave \[1, 2\] and no choices"),
        ((200, {}, b'{"choices": [7]}'), "gave an object with 0 keys without a message"),
    ],
    ids=["down", "refused", "not JSON", "a list", "no message"],
)
def test_what_fails_for_good_says_what_was_asked_of_whom(serve: Callable[..., Api], fault: Any, told: str) -> None:
    api = serve(fault=lambda number: fault if number >= 2 else None)
    with pytest.raises(EngineError, match=told) as caught:
        written(engine_of(api, client={"retries": 2, "at_a_time": 1}), REQUESTS, DRAWN)
    assert api.url in str(caught.value) and '"question 2"' in str(caught.value)


def test_a_server_that_is_silent(serve: Callable[..., Api]) -> None:
    api = serve()
    engine = engine_of(api, client={"seconds": 0.1, "retries": 0})
    api.seconds = 0.5
    with pytest.raises(EngineError, match="no answer in time; --requests sends fewer"):
        written(engine, REQUESTS[:1], DRAWN)


def test_a_reply_without_end_is_not_read(serve: Callable[..., Api], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer2edit.engines.server_client._BYTES", 1 << 20)
    api = serve(message=lambda body: {"role": "assistant", "content": "x" * (2 << 20)})
    with pytest.raises(EngineError, match="a reply of more than 1 MiB"):
        written(engine_of(api), REQUESTS[:1], DRAWN)


def test_nobody_answers() -> None:
    with pytest.raises(
        EngineError, match=r"127\.0\.0\.1:9/v1 was asked for the list of its models; it cannot be reached"
    ):
        ServerEngine(ServerClient("http://127.0.0.1:9", retries=0))


def test_many_at_a_time_and_no_more(serve: Callable[..., Api]) -> None:
    together = threading.Barrier(4, timeout=20)

    def message(body: dict[str, Any]) -> dict[str, Any]:
        together.wait()  # each of four waits for the three others
        return {"content": "x"}

    api = serve(message=message)
    written(engine_of(api, client={"at_a_time": 4}), REQUESTS, DRAWN)
    assert api.most_under_way == 4


def test_a_rate(serve: Callable[..., Api]) -> None:
    api = serve()
    engine = engine_of(api, client={"rate": 1200})
    started = time.monotonic()
    written(engine, REQUESTS[:5], DRAWN)
    # a twentieth of a second for each but the first
    assert max(api.times) - started >= 4 / 20


def test_who_stops_asking_begins_no_further_request(serve: Callable[..., Api]) -> None:
    api = serve(seconds=0.02)
    answers = engine_of(api, client={"at_a_time": 2}).write(REQUESTS, DRAWN)
    next(answers)
    answers.close()
    begun = len(api.asked)
    assert begun < 6
    written(engine_of(api), REQUESTS[:1], DRAWN)
    assert len(api.asked) <= begun + 3


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_url_with_or_without_its_version(serve: Callable[..., Api], path: str) -> None:
    api = serve()
    assert engine_of(api, url=api.url + path).described()["url"] == f"{api.url}/v1"


def test_an_api_under_another_path(serve: Callable[..., Api]) -> None:
    api = serve(prefix="/v1beta/openai")
    engine = engine_of(api, url=f"{api.url}/v1beta/openai")
    assert engine.model == "served"


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "http://host:port/v1", ""])
def test_what_is_not_a_url(url: str) -> None:
    with pytest.raises(EngineError, match="is not a server's URL, such as http://localhost:8000/v1"):
        ServerClient(url)


def test_the_model_is_found_or_has_to_be_named(serve: Callable[..., Api]) -> None:
    assert engine_of(serve(models=["one"])).model == "one"
    with pytest.raises(EngineError, match="serves 2 models:\n  - base\n  - blunt\nname the model with --server-model"):
        engine_of(serve(models=["base", "blunt"]))
    with pytest.raises(EngineError, match="does not list its models; name the model"):
        engine_of(serve(lists=False))
    assert engine_of(serve(lists=False), model="mine").model == "mine"
    # llama.cpp would answer to any name
    for owner in ("vllm", "llamacpp"):
        with pytest.raises(EngineError, match='does not serve "other"; it serves:\n  - base\n  - blunt'):
            engine_of(serve(models=["base", "blunt"], owner=owner), model="other")
    assert engine_of(serve(models=["base"], owner="cloud"), model="other").model == "other"
    with pytest.raises(EngineError, match="name the model with --judge-model"):
        engine_of(serve(models=["base", "blunt"]), flag="--judge-model")


def test_adapters_that_a_request_chooses_are_models_too(serve: Callable[..., Api]) -> None:
    api = serve(owner="llamacpp", adapters=["/x/adapter.gguf", "/y/adapter.gguf", "/y/kind.gguf"])
    for model, bare, chosen in (
        ("kind.gguf", False, [{"id": 2, "scale": 1.0}]),
        ("y/adapter.gguf", True, [{"id": 1, "scale": 1.0}]),
        (None, True, []),
        ("served", True, []),
        (None, False, None),
    ):
        engine = engine_of(api, model=model, bare=bare)
        written(engine, REQUESTS[:1], DRAWN)
        engine.yes(REQUESTS[:0])
        assert api.asked[-1].get("lora") == chosen and api.asked[-1]["model"] == "served"
        assert engine.described().get("adapter") == (model if chosen else None)
    with pytest.raises(EngineError, match=r"x/adapter\.gguf\n  - y/adapter\.gguf\n  - kind\.gguf"):
        engine_of(api, model="adapter.gguf")


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    serve: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = serve(key=KEY)
    with pytest.raises(EngineError, match="was given none: set the environment variable STEER2EDIT_API_KEY"):
        engine_of(api)
    assert "Authorization" not in api.headers[-1]
    # another service's key is not sent
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "of another account")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    with pytest.raises(EngineError):
        engine_of(api)
    assert "another account" not in json.dumps(api.headers) and "org-mine" not in json.dumps(api.headers)
    monkeypatch.setenv("STEER2EDIT_API_KEY", "sk-" + "wrong-key-0987654321")
    with pytest.raises(EngineError, match="was given another") as caught:
        engine_of(api)
    assert "0987654321" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", KEY)
    engine = engine_of(api, client={"key_variable": "MY_KEY"})
    written(engine, REQUESTS[:1], DRAWN)
    assert KEY not in json.dumps(engine.described()) and KEY not in repr(vars(engine))


def test_a_password_in_the_url_is_neither_shown_nor_kept(serve: Callable[..., Api]) -> None:
    api = serve(fault=lambda number: (400, {}, b'{"error": {"message": "no"}}'))
    url = api.url.replace("http://", "http://me:" + "hunter2@") + "?token=" + "t0ps3cret"
    engine = engine_of(api, url=url)
    assert api.headers[-1]["Authorization"].startswith("Basic ")
    assert engine.described()["url"] == f"{api.url}/v1"
    with pytest.raises(EngineError) as caught:
        written(engine, REQUESTS[:1], DRAWN)
    assert "hunter2" not in str(caught.value) and "t0ps3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "settings", "repeated"),
    # llama.cpp gives the prefix again, and vLLM does not
    [("vllm", {"continue_final_message": True}, ""), ("llamacpp", {}, "The beginning")],
)
def test_a_prefix_is_continued_where_the_server_can(
    serve: Callable[..., Api], owner: str, settings: dict[str, Any], repeated: str
) -> None:
    api = serve(owner=owner, message=lambda body: {"role": "assistant", "content": f"{repeated} and the rest"})
    (answer,) = written(engine_of(api), [Request("question", prefix="The beginning")], DRAWN)
    assert answer.text == " and the rest"
    assert api.asked[0]["messages"][-1] == {"role": "assistant", "content": "The beginning"}
    assert settings.items() <= api.asked[0].items()


def test_a_prefix_is_refused_where_the_server_may_not(serve: Callable[..., Api]) -> None:
    api = serve(owner="somebody")
    with pytest.raises(EngineError, match="is not known to continue an answer"):
        written(engine_of(api), [Request("question", prefix="The beginning")], DRAWN)
    with pytest.raises(EngineError, match="is not known to take arguments for the chat template"):
        engine_of(api, chat_template_kwargs={"enable_thinking": False})
    assert "top_k" not in (written(engine_of(api), REQUESTS[:1], DRAWN) and api.asked[-1])


def test_yes_sums_the_spellings(serve: Callable[..., Api]) -> None:
    top = [("Yes", math.log(0.5)), (" yes", math.log(0.1)), ("No", math.log(0.2)), ("Maybe", math.log(0.1))]
    api = serve(top=top)
    assert engine_of(api).yes(REQUESTS[:2]) == pytest.approx([0.75, 0.75])
    assert api.asked[0]["max_tokens"] == 1 and api.asked[0]["temperature"] == 0
    (share,) = engine_of(serve(top=[("Maybe", -0.1)])).yes(REQUESTS[:1])
    assert math.isnan(share)
    with pytest.raises(EngineError, match="gave no logprobs, without which served cannot judge"):
        engine_of(serve(top=None)).yes(REQUESTS[:1])


def test_the_thought_is_taken_from_where_the_server_puts_it(serve: Callable[..., Api]) -> None:
    apart = serve(
        message=lambda body: {"content": "It is.", "reasoning_content": "well"},
        usage={"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 6}},
    )
    assert written(engine_of(apart, think=True), REQUESTS[:1], DRAWN) == [Answer("It is.", 2, True, "well", 6)]
    assert "chat_template_kwargs" not in apart.asked[0]
    inside = serve(message=lambda body: {"content": "<think>well</think>It is."}, finish="length")
    (answer,) = written(engine_of(inside, think=True), REQUESTS[:1], DRAWN)
    assert (answer.text, answer.thought, answer.ended) == ("It is.", "well", False)
    assert answer.tokens + answer.thought_tokens == 7
    unfinished = serve(message=lambda body: {"content": None, "reasoning": "well, and"}, finish="length")
    assert written(engine_of(unfinished, think=True), REQUESTS[:1], DRAWN) == [Answer("", 0, False, "well, and", 7)]


def test_tokens(serve: Callable[..., Api]) -> None:
    api = serve(usage=None, message=lambda body: {"content": "x" * 40})
    with collected() as notices:
        (answer,) = written(engine_of(api), REQUESTS[:1], DRAWN)
    assert answer.tokens == 10 and "counts no tokens: those of 1 answer are estimated" in notices[0]
    assert engine_of(api).count_tokens("three words here") == 3
    assert engine_of(serve(owner="llamacpp")).count_tokens("three words here") == 3
    assert engine_of(serve(owner="somebody")).count_tokens("three words here") is None
    # by whoever knows how to, where there is somebody
    with collected() as notices:
        (answer,) = written(engine_of(api, count=lambda text: len(text) // 8), REQUESTS[:1], DRAWN)
    assert answer.tokens == 5 and "those of 1 answer are counted by the model's tokenizer" in notices[0]
    # an end token counts where the server is known to count it, and an answer that was cut has none
    for owner, finish, count in (("vllm", "length", 7), ("llamacpp", "stop", 6), ("somebody", "stop", 7)):
        (answer,) = written(engine_of(serve(owner=owner, finish=finish)), REQUESTS[:1], DRAWN)
        assert answer.tokens == count
    many = serve(usage={"completion_tokens": 90})
    with collected() as notices:
        written(engine_of(many), REQUESTS[:1], DRAWN)
    assert "more than 20 tokens" in notices[0]


def test_the_newer_name_of_the_limit(serve: Callable[..., Api]) -> None:
    told = b'{"error": {"message": "Unsupported parameter: use max_completion_tokens"}}'
    api = serve(owner="openai")
    api.fault = lambda number: (400, {}, told) if "max_tokens" in api.asked[number] else None
    written(engine_of(api, client={"at_a_time": 1}), REQUESTS[:3], DRAWN)
    assert [one.get("max_completion_tokens") for one in api.asked] == [None, 20, 20, 20]


def test_chats_are_sent_as_they_are(serve: Callable[..., Api]) -> None:
    api = serve()
    chat = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    written(engine_of(api), [Request(chat)], DRAWN)
    assert [one["content"] for one in api.asked[0]["messages"]] == ["a", "b", "c"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refusing(name: str, *more: Any, **others: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return imported(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(EngineError, match=r"pip install 'steer2edit\[server\]'"):
        ServerClient("http://localhost:1")
