"""A small server on loopback that speaks the OpenAI API, with whatever faults a test asks for.

Its answers are made of the request alone: the last message, the seed and the settings. It keeps what it receives.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


def echoed(body: dict[str, Any]) -> dict[str, Any]:
    """A message that tells what was asked."""
    text = f"{body['messages'][-1]['content']} | {body.get('seed')} | {body.get('temperature')}"
    return {"role": "assistant", "content": text}


@dataclass
class Api:
    """The server's state: what it serves, how it fails, and what it was asked.

    ``fault`` gets the number of the chat request and gives a status, headers and a body in place of an answer, or None. A
    status of 0 cuts the connection. A message may bring its own ``finish_reason`` and ``usage``. ``adapters`` are paths of those
    that a request may choose.
    """

    models: list[str] = field(default_factory=lambda: ["served"])
    owner: str = "vllm"
    message: Callable[[dict[str, Any]], dict[str, Any]] = echoed
    finish: str = "stop"
    top: list[tuple[str, float]] | Callable[[dict[str, Any]], list[tuple[str, float]]] | None = None
    usage: dict[str, Any] | None = field(default_factory=lambda: {"completion_tokens": 7})
    fault: Callable[[int], tuple[int, dict[str, str], bytes] | None] = lambda number: None
    seconds: float = 0.0
    lists: bool = True
    adapters: list[str] = field(default_factory=list)
    prefix: str = "/v1"
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def served(api: Api) -> Iterator[Api]:
    """Within the block the API is served at ``api.url``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def refused(self) -> bool:
            with api.lock:
                api.headers.append(dict(self.headers.items()))
            if api.key is not None and self.headers.get("Authorization") != f"Bearer {api.key}":
                sent = self.headers.get("Authorization")
                self.reply(401, {"error": {"message": f"wrong key: {sent}"}})
                return True
            return False

        def do_GET(self) -> None:
            if self.refused():
                return
            if self.path == "/lora-adapters" and api.adapters:
                self.reply(200, [{"id": n, "path": path, "scale": 0.5} for n, path in enumerate(api.adapters)])
                return
            if not api.lists or self.path.partition("?")[0] != f"{api.prefix}/models":
                self.reply(404, {"error": {"message": "not found"}})
                return
            self.reply(200, {"object": "list", "data": [{"id": name, "owned_by": api.owner} for name in api.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.refused():
                return
            if self.path == "/tokenize":
                self.reply(200, {"tokens": list(range(len((body.get("prompt") or body["content"]).split())))})
                return
            with api.lock:
                number = len(api.asked)
                api.asked.append(body)
                api.times.append(time.monotonic())
                api.under_way += 1
                api.most_under_way = max(api.most_under_way, api.under_way)
            try:
                time.sleep(api.seconds)
                self.answer(number, body)
            finally:
                with api.lock:
                    api.under_way -= 1

        def answer(self, number: int, body: dict[str, Any]) -> None:
            if (fault := api.fault(number)) is not None:
                status, headers, raw = fault
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.reply(status, raw, headers)
                return
            message = dict(api.message(body))
            finish, used = message.pop("finish_reason", api.finish), message.pop("usage", api.usage)
            choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
            if body.get("logprobs") and api.top is not None:
                likeliest = api.top(body) if callable(api.top) else api.top
                top = [{"token": token, "logprob": value} for token, value in likeliest]
                choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
            usage = {} if used is None else {"usage": used}
            self.reply(200, {"id": "1", "object": "chat.completion", "choices": [choice], **usage})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Api]]:
    """Within the block what is called with an Api's state serves it; keys and proxies of the environment are away."""
    for name in ("STEER2EDIT_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:
        yield lambda **state: stack.enter_context(served(Api(**state)))
