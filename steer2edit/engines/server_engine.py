"""The engine behind a URL: vLLM, llama.cpp, SGLang, LM Studio, or a cloud, through the OpenAI API.

The server renders prompts by its own template. What only some servers can do (continue a prefix, count tokens, take arguments
for the template) is done where the server is one of those, and refused elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from steer2edit.data.templates import TemplateArguments, check_arguments, thought_and_answer
from steer2edit.engines.engine import NO, YES, Answer, Request, Sampling, yes_share
from steer2edit.engines.server_client import ServerClient
from steer2edit.errors import DataError, EngineError, count_of, listing, shown
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent

_TOP = 20
"""How many of the likeliest first tokens are asked for where a yes is to be found among them."""
_PLAIN: Mapping[str, Any] = {"temperature": 0.0, "top_p": 1.0}
_NO_THOUGHT = {"enable_thinking": False, "thinking": False}
"""What templates of models that think take, for an answer without a thought; other templates pass it over."""


@dataclass(frozen=True)
class _Kind:
    """What a server can do beside the API, told by the owner that it names in its list of models.

    ``everything`` are the settings with which it samples from all tokens, as temperature and top_p alone say. One that
    ``repeats`` gives a prefix again at the beginning of the answer. One that ``counts_end`` counts the end token too.
    ``adapters`` is where it lists adapters that a request may choose.
    """

    name: str = "unknown"
    prefix: Mapping[str, Any] | None = None
    template: bool = False
    everything: Mapping[str, Any] | None = None
    tokenize: str = ""
    repeats: bool = False
    counts_end: bool = False
    adapters: str = ""


_CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
_KINDS = {
    "vllm": _Kind("vLLM", _CONTINUED, True, {"top_k": 0, "min_p": 0.0}, "prompt", counts_end=True),
    "sglang": _Kind("SGLang", {"continue_final_message": True}, True, {"top_k": -1, "min_p": 0.0}),
    # it goes on from an assistant's message that is the last
    "llamacpp": _Kind(
        "llama.cpp",
        {},
        True,
        {"top_k": 0, "min_p": 0.0},
        "content",
        repeats=True,
        counts_end=True,
        adapters="/lora-adapters",
    ),
}


class ServerEngine:
    """Answers of a model that a server serves; which one is ``model``, where it serves several.

    An adapter that a request may choose (llama.cpp) is a model too, under its file's name. A ``bare`` engine answers without
    such adapters; otherwise they are as the server was started. ``chat_template_kwargs`` and ``think`` are passed on to servers
    that take arguments for the template. ``count`` counts the tokens of a text where the server counts none. ``flag`` is what
    names the model, for an error. Raises EngineError where the server cannot be reached, does not serve ``model``, or serves
    several models and none is named.
    """

    def __init__(
        self,
        client: ServerClient,
        *,
        model: str | None = None,
        chat_template_kwargs: TemplateArguments | None = None,
        think: bool = False,
        bare: bool = False,
        count: Callable[[str], int] | None = None,
        flag: str = "--server-model",
    ) -> None:
        self._client, self._count = client, count
        models = client.models()
        owner = next((one.owner for one in models or () if one.owner.casefold() in _KINDS), "")
        self._kind = _KINDS.get(owner.casefold(), _Kind())
        names = [one.name for one in models or ()]
        adapters = self._adapters()
        self.adapter = model if model is not None and model not in names and model in adapters.values() else None
        wanted = None if self.adapter is not None else model
        if wanted is None and len(names) != 1:
            found = f"serves {len(names)} models:\n{listing(names)}\n" if names else "does not list its models; "
            raise EngineError(f"{client.shown} {found}name the model with {flag}")
        # other servers may serve what they do not list, and refuse what they do not know
        if wanted is not None and names and wanted not in names and self._kind.template:
            raise EngineError(
                f"{client.shown} does not serve {shown(wanted)}; it serves:\n{listing([*names, *adapters.values()])}"
            )
        self.model = wanted or names[0]
        self._extra: dict[str, Any] = {}
        if self.adapter is not None or (bare and adapters):
            chosen = [number for number, name in adapters.items() if name == self.adapter]
            self._extra = {"lora": [{"id": number, "scale": 1.0} for number in chosen]}
        self._arguments, self._think = check_arguments(chat_template_kwargs), think
        if self._arguments and not self._kind.template:
            raise EngineError(
                f"{client.shown} is not known to take arguments for the chat template ({', '.join(self._arguments)}); start "
                "the server with them"
            )
        self._limit = "max_tokens"
        self._uncounted = 0

    def described(self) -> dict[str, Any]:
        """The server's URL without what is secret in it, its kind, the model's name there, and the client's version."""
        return {
            "engine": "server",
            "url": self._client.shown,
            "server": self._kind.name,
            "model": self.model,
            **({"adapter": self.adapter} if self._extra else {}),
            "chat_template_kwargs": self._arguments,
            "think": self._think,
            "versions": {"openai": version("openai")},
        }

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        """Each request's number and answer, as the server gives them.

        A request carries a seed of its own; whether the same seed gives the same answer is up to the server. Raises EngineError
        where the server fails for good, or cannot continue a prefix.
        """
        self._check(requests)
        longer = estimated = 0
        with progress("write answers", total=len(requests)) as advance:
            for index, reply in self._client.each(lambda one: self._asked(one, sampling), requests):
                answer = self._answer(reply, requests[index])
                estimated += not answer.counted
                self._uncounted += not answer.counted
                longer += answer.tokens + answer.thought_tokens > sampling.max_new_tokens
                advance(1)
                yield index, answer
        if longer:
            wrote = f"{count_of(longer, 'answer')} of more than {count_of(sampling.max_new_tokens, 'token')}"
            notice(f"{self._client.shown} wrote {wrote}, which were asked for")
        if estimated:
            how = "estimated by their letters" if self._count is None else "counted by the model's tokenizer"
            notice(f"{self._client.shown} counts no tokens: those of {count_of(estimated, 'answer')} are {how}")

    def yes(self, requests: Sequence[Request]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) among the likeliest first tokens; nan where neither is among them.

        Raises EngineError where the server gives no probabilities.
        """
        self._check(requests)
        shares = dict(self._client.each(self._yes, requests))
        return [shares[index] for index in range(len(requests))]

    @property
    def place(self) -> tuple[str, str, str | None]:
        """The server's URL, the model's name there, and the adapter that requests choose."""
        return self._client.shown, self.model, self.adapter

    def counted(self, estimated: bool | None = None) -> str:
        """Who counted the tokens of the answers so far, or of others, of which some are ``estimated`` or none."""
        if not (self._uncounted if estimated is None else estimated):
            return "the server"
        return "their letters" if self._count is None else "the model's tokenizer"

    def count_tokens(self, text: str) -> int | None:
        """How many tokens a text has; None where the server does not say."""
        if not self._kind.tokenize:
            return None
        body = {"model": self.model, self._kind.tokenize: text, "add_special_tokens": False, "add_special": False}
        if self._kind.tokenize == "content":
            del body["add_special_tokens"]
        else:
            del body["add_special"]
        reply = self._client.post("/tokenize", body)
        tokens = reply.get("tokens") if isinstance(reply, dict) else None
        return len(tokens) if isinstance(tokens, list) else None

    def _adapters(self) -> dict[int, str]:
        """The adapters that a request may choose, by their numbers: the names of their files.

        The folder stands before a name that several have.
        """
        listed = self._client.get(self._kind.adapters) if self._kind.adapters else None
        entries = [one for one in map(_object, listed if isinstance(listed, list) else []) if "id" in one]
        paths = {int(one["id"]): PurePath(str(one.get("path", ""))) for one in entries}
        names = Counter(path.name for path in paths.values())
        return {
            number: path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}"
            for number, path in paths.items()
        }

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            own = not isinstance(request.prompt, str) and any(m.role == "system" for m in request.prompt)
            if own and request.system is not None:
                raise DataError(
                    f"{request.where or _named(request)}: the prompt has a system message of its own, and a system text is given "
                    "too: keep one"
                )
        if self._kind.prefix is None and any(request.prefix for request in requests):
            raise EngineError(
                f"{self._client.shown} is not known to continue an answer that is begun (vLLM, SGLang and llama.cpp do): use one "
                "of these, or --engine transformers"
            )

    def _asked(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        if sampling.repetition_penalty is not None:
            raise EngineError(f"a repetition penalty is set where {self._client.shown} is started, and not asked of it")
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": request.seed(sampling.seed)}
        if sampling.temperature:
            settings |= self._kind.everything or {}
        thinks = {} if self._think and not request.prefix else self._not_asked
        return self._send(
            request, f"an answer of {self.model} to {_named(request)}", sampling.max_new_tokens, settings, thinks
        )

    def _yes(self, request: Request) -> float:
        what = f"the probability of a yes of {self.model} to {_named(request)}"
        reply = self._send(request, what, 1, {**_PLAIN, "logprobs": True, "top_logprobs": _TOP}, _NO_THOUGHT)
        content = _object(_object(reply["choices"][0]).get("logprobs")).get("content")
        top = _object(content[0] if isinstance(content, list) and content else None).get("top_logprobs")
        if not isinstance(top, list) or not top:
            raise EngineError(
                f"{self._client.shown} was asked for {what} and gave no logprobs, without which {self.model} cannot judge: "
                "choose another judge, or a server that gives them (vLLM and llama.cpp do)"
            )
        sums = {"yes": 0.0, "no": 0.0}
        spellings = {text.strip(): word for word, texts in (("yes", YES), ("no", NO)) for text in texts}
        for one in map(_object, top):
            word = spellings.get(str(one.get("token", "")).strip())
            if word and isinstance(one.get("logprob"), (int, float)):
                sums[word] += math.exp(min(0.0, one["logprob"]))
        return yes_share(sums["yes"], sums["no"])

    def _send(
        self, request: Request, what: str, most: int, settings: dict[str, Any], template: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The reply; ``template`` are arguments for a chat template that takes them."""
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        body = {**settings, **self._extra}
        if request.prefix:
            messages.append({"role": "assistant", "content": request.prefix})
            body |= self._kind.prefix or {}
        if self._kind.template and (arguments := {**self._arguments, **template}):
            body["chat_template_kwargs"] = arguments
        try:
            return self._client.chat(self.model, messages, what, **body, **{self._limit: most})
        except EngineError as error:
            # newer models of OpenAI know the other name alone
            if self._limit != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self._limit = "max_completion_tokens"
            return self._client.chat(self.model, messages, what, **body, **{self._limit: most})

    @property
    def _not_asked(self) -> Mapping[str, Any]:
        """Arguments for an answer without a thought, unless the user's own say something of it."""
        return {} if _NO_THOUGHT.keys() & self._arguments.keys() else _NO_THOUGHT

    def _answer(self, reply: Mapping[str, Any], request: Request) -> Answer:
        """The answer in a reply."""
        choice = _object(reply["choices"][0])
        message = choice.get("message")
        if not isinstance(message, dict):
            raise EngineError(
                f"{self._client.shown} was asked for an answer to {_named(request)} and gave {shown(choice)} without a message"
            )
        content = message.get("content")
        content = content if isinstance(content, str) else ""
        if self._kind.repeats and request.prefix:
            content = content.removeprefix(request.prefix)
        thought, text = thought_and_answer(content)
        apart = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(apart, str) and apart.strip():
            thought = apart.strip()
        text = text.rstrip() if request.prefix else text.strip()
        ended = choice.get("finish_reason") == "stop"
        total, of_thought, counted = self._tokens(reply, thought, text, ended)
        return Answer(text, total - of_thought, ended, thought, of_thought, counted)

    def _tokens(self, reply: Mapping[str, Any], thought: str | None, text: str, ended: bool) -> tuple[int, int, bool]:
        """Tokens of thought and answer together, those of the thought, and whether the server counted them."""
        usage = _object(reply.get("usage"))
        total = usage.get("completion_tokens")
        letters = len(text) + len(thought or "")
        counted = isinstance(total, int)
        if isinstance(total, int):
            whole = max(0, total - (ended and self._kind.counts_end))
        elif self._count is not None:
            whole = self._count(text) + (self._count(thought) if thought else 0)
        else:
            whole = math.ceil(letters / 4)
        if thought is None:
            return whole, 0, counted
        told = _object(usage.get("completion_tokens_details")).get("reasoning_tokens")
        if isinstance(told, int) and 0 < told <= whole:
            return whole, told, counted
        # without the answer's text there is no answer to count
        return whole, whole if not text else round(whole * len(thought) / max(1, letters)), counted


def _object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one in place of anything else that a server may give."""
    return value if isinstance(value, dict) else {}


def _named(request: Request) -> str:
    return shown(request.messages[-1].content)
