"""Requests to a server that speaks the OpenAI API.

Many are under way at a time. They are retried and paced, and replies are bounded. The ``openai`` client sends them; the key
comes from an environment variable, and is neither shown nor kept.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from steer2edit.errors import EngineError, count_of, first_line, shown, without_passwords
from steer2edit.files.untrusted import parse_json
from steer2edit.notices import notice

API_KEY = "STEER2EDIT_API_KEY"
"""The environment variable of the key. Another tool's key is not sent to a server that it was not made for."""
_OPENAI_HOST, _OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
_BYTES = 16 << 20
"""A reply is no longer than that."""
_SECONDS, _CONNECT_SECONDS = 600.0, 10.0
_RETRIES, _RETRIES_AT_FIRST = 8, 1
"""How often a request is sent again after a refusal, a failure of the server, or silence; and the first of all."""
_MALFORMED = 3
"""How often a request is sent whose reply cannot be read."""
_MESSAGE = 300
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServedModel:
    """A model that a server lists: its name there, and whom the server calls its owner."""

    name: str
    owner: str


class ServerClient:
    """A connection to one server. ``url`` is with or without ``/v1``; ``shown`` is the URL without what is secret in it.

    ``at_a_time`` requests are under way together, and ``rate`` bounds those that are begun within a minute. Raises EngineError
    where the openai package is not installed, or where the URL is not one.
    """

    def __init__(
        self,
        url: str,
        *,
        at_a_time: int = 8,
        rate: float | None = None,
        key_variable: str | None = None,
        seconds: float = _SECONDS,
        retries: int = _RETRIES,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise EngineError(
                "a server is asked through the openai package, which is not installed: pip install 'steer2edit[server]'"
            ) from None
        self._openai: Any = openai
        self._roots, self.shown = _addresses(url)
        self._key, self._variable = _key_of(url, key_variable)
        self._at_a_time, self._retries = at_a_time, retries
        self._pace = _Pace(rate)
        # no header of another account, which the client would take from its own variables, and none for a key that is not there
        omitted = openai.Omit()
        self._headers: Any = {"OpenAI-Organization": omitted, "OpenAI-Project": omitted}
        if self._key is None:
            self._headers["Authorization"] = omitted
        elif self._roots[0].startswith("http://") and not _is_local(self._roots[0]):
            notice(
                f"the key in ${self._variable} goes to {self.shown} without encryption, because the URL begins with http:"
            )
        timeout = openai.Timeout(seconds, connect=_CONNECT_SECONDS)
        self._client: Any = openai.OpenAI(
            base_url=self._roots[0],
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=retries,
            default_query=dict(parse_qsl(urlsplit(url).query)),
        )
        weakref.finalize(self, self._client.close)
        self.resent = 0
        """Requests that were sent again."""

    def models(self) -> list[ServedModel] | None:
        """The models that the server lists; None where it lists none, as some servers do.

        The first URL under which there is a list is used from then on. Raises EngineError where the server cannot be reached.
        """
        for root in self._roots:
            client = self._client.with_options(base_url=root, max_retries=min(self._retries, _RETRIES_AT_FIRST))
            try:
                listed = self._read(client.models.with_streaming_response.list(extra_headers=self._headers))
            except self._openai.NotFoundError:
                continue
            except (self._openai.APIError, ValueError) as error:
                raise self._error("the list of its models", error) from None
            self._client = self._client.with_options(base_url=root)
            entries = listed.get("data") if isinstance(listed, dict) else None
            if not isinstance(entries, list):
                raise EngineError(f"{self.shown} was asked for the list of its models and gave {shown(listed)}")
            return [
                ServedModel(str(one["id"]), str(one.get("owned_by") or ""))
                for one in entries
                if isinstance(one, dict) and "id" in one
            ]
        return None

    def chat(self, model: str, messages: Sequence[dict[str, str]], what: str, **settings: Any) -> dict[str, Any]:
        """The reply to one chat request, as JSON; ``what`` says in an error what was asked for.

        ``settings`` go into the request's body. Raises EngineError when the retries are over, or at once for what is refused.
        """
        self._pace.wait()
        create = self._client.chat.completions.with_streaming_response.create
        for left in reversed(range(_MALFORMED)):
            try:
                reply = self._read(
                    create(model=model, messages=list(messages), extra_body=settings, extra_headers=self._headers)
                )
                if isinstance(reply, dict) and isinstance(reply.get("choices"), list) and reply["choices"]:
                    return reply
                reason: Exception = ValueError(f"it gave {shown(reply)} and no choices")
            except self._openai.APIStatusError as error:
                raise self._error(what, error) from None
            except (self._openai.APIError, ValueError, OSError) as error:
                reason = error
            if not left or isinstance(reason, self._openai.APIError):
                raise self._error(what, reason)
            self.resent += 1
        raise AssertionError("the loop ends in a reply or an error")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply to a request beside the API, such as ``/tokenize`` at the server's root; None where there is none."""
        return self._beside("post", path, body=body)

    def get(self, path: str) -> Any:
        """What the server has beside the API at ``path``; None where there is nothing."""
        return self._beside("get", path)

    def _beside(self, method: str, path: str, **more: Any) -> Any:
        root = self._roots[0].rsplit("/v1", 1)[0]
        client = self._client.with_options(base_url=root, max_retries=_RETRIES_AT_FIRST)
        try:
            return getattr(client, method)(path, cast_to=object, options={"headers": self._headers}, **more)
        except (self._openai.APIError, ValueError):
            return None

    def each(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[tuple[int, _Result]]:
        """Index and result of ``work`` on each item, as they are ready, ``at_a_time`` together.

        The first error ends it, and so does the caller who stops asking: then no further item is begun.
        """
        todo = iter(range(len(items)))
        ready: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        lock, stopped = threading.Lock(), threading.Event()

        def worker() -> None:
            while not stopped.is_set():
                with lock:
                    index = next(todo, None)
                if index is None:
                    return
                try:
                    ready.put((index, work(items[index]), None))
                except BaseException as error:  # whatever it is, the caller's thread raises it
                    ready.put((index, None, error))

        # daemons: nothing waits for a server that is silent when the program is to end
        for _ in range(min(self._at_a_time, len(items))):
            threading.Thread(target=worker, daemon=True).start()
        resent = self.resent
        try:
            for _ in items:
                index, result, error = ready.get()
                if error is not None:
                    raise error
                yield index, result
        finally:
            stopped.set()
            if self.resent > resent:
                again = count_of(self.resent - resent, "request was", "requests were")
                notice(f"{self.shown} failed or refused at times: {again} sent again")

    def _read(self, opened: Any) -> Any:
        """The JSON of a reply. Raises ValueError for a reply that is too long, breaks off, or is not JSON."""
        content = bytearray()
        with opened as response:
            self.resent += response.retries_taken
            try:
                for part in response.iter_bytes():
                    content += part
                    if len(content) > _BYTES:
                        raise EngineError(f"{self.shown} gave a reply of more than {_BYTES >> 20} MiB")
            except self._openai.APIError:
                raise
            except Exception as error:
                # httpx's own errors of a reply that breaks off, which the client passes on as they are
                if type(error).__module__.startswith("httpx"):
                    raise ValueError(f"the reply breaks off ({type(error).__name__})") from None
                raise
        try:
            return parse_json(bytes(content))
        except ValueError:
            raise ValueError(f"it gave {shown(content[:60].decode('utf-8', 'replace'))}, which is not JSON") from None

    def _error(self, what: str, error: Exception) -> EngineError:
        """The error for the user: what was asked of whom, and what came of it."""
        api = self._openai
        if isinstance(error, api.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            told = self._clean(str(body.get("message") or first_line(error)))
            reason = f"it answered with status {error.status_code}: {told}"
            if error.status_code in (401, 403):
                key = "was given none" if self._key is None else "was given another"
                reason += f". It wants a key and {key}: set the environment variable {self._variable}"
            elif error.status_code == 429 or error.status_code >= 500:
                reason += f" (sent {self._retries + 1} times)"
        elif isinstance(error, api.APITimeoutError):
            reason = "it gave no answer in time; --requests sends fewer at a time"
        elif isinstance(error, api.APIConnectionError):
            cause = error.__cause__ or error
            reason = f"it cannot be reached ({self._clean(first_line(cause))}); is it running?"
        else:
            reason = self._clean(first_line(error))
        return EngineError(f"{self.shown} was asked for {what}; {reason}")

    def _clean(self, text: str) -> str:
        text = without_passwords(text[:_MESSAGE])
        return text.replace(self._key, "***") if self._key else text


class _Pace:
    """Lets at most ``rate`` requests begin within a minute, evenly; None lets all."""

    def __init__(self, rate: float | None) -> None:
        self._gap = 60 / rate if rate else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Wait for this request's turn."""
        if not self._gap:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        time.sleep(max(0.0, turn - time.monotonic()))


def _addresses(url: str) -> tuple[list[str], str]:
    """The URLs under which the API may be, and the URL without user, password and query."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        place = host and (host if parts.port is None else f"{host}:{parts.port}")
    except ValueError:
        place = None
    if parts.scheme not in ("http", "https") or not place:
        raise EngineError(f"{shown(without_passwords(url))} is not a server's URL, such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    versioned = path.rsplit("/", 1)[-1][:1] == "v" and path.rsplit("/", 1)[-1][1:2].isdigit()
    paths = [path] if versioned else [f"{path}/v1", *([path] if path else [])]
    roots = [urlunsplit((parts.scheme, parts.netloc, one, "", "")) for one in paths]
    return roots, urlunsplit((parts.scheme, place, paths[0], "", ""))


def _key_of(url: str, variable: str | None) -> tuple[str | None, str]:
    """The key and the variable that it comes from."""
    variable = variable or API_KEY
    key = os.environ.get(variable)
    if not key and variable == API_KEY and urlsplit(url).hostname == _OPENAI_HOST:
        key, variable = os.environ.get(_OPENAI_KEY), _OPENAI_KEY
    if key and not key.isascii():
        raise EngineError(f"the key in the environment variable {variable} holds characters that no key has")
    return (key.strip() or None) if key else None, variable


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"
