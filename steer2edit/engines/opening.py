"""Opening the engine that a user names: by kind, by a model's folder, or by a server's URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.contrast import Example
from steer2edit.data.templates import TemplateArguments
from steer2edit.engines.agreement import LabelledAnswer, of_both_kinds
from steer2edit.engines.engine import Engine, Request
from steer2edit.engines.judge import TRIED, Judge, tried
from steer2edit.engines.server_client import ServerClient
from steer2edit.engines.server_engine import ServerEngine
from steer2edit.engines.transformers_engine import BATCH, TransformersEngine
from steer2edit.engines.vllm_engine import CONTEXT, VllmEngine
from steer2edit.errors import EngineError
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel, Runtime, load_model

EngineName = Literal["transformers", "vllm"]
SELF = "self"
"""The judge that is the model itself."""


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges, and the trait to look for.

    ``where`` is "self", a model's folder or Hub id, or a server's URL. ``model`` is the judge's name on a server; the rest says
    how a server is asked.
    """

    where: str
    trait: str
    model: str | None = None
    at_a_time: int = 8
    rate: float | None = None
    key_variable: str | None = None

    def open(
        self,
        own: Engine,
        runtime: Runtime = Runtime(),  # noqa: B008
        examples: Sequence[Example] = (),
        progress: Progress = silent,
        kept: Callable[[Engine], Engine] = lambda engine: engine,
    ) -> Judge:
        """The judge, tried on labelled answers: on ``examples`` of the trait, or on the packaged ones where there are none.

        "self" is the model's ``own`` engine, without any edit whenever it is asked. ``kept`` makes of another engine that which
        is asked, such as one with a journal.
        """
        if self.where == SELF:
            engine = own
        else:
            asked: dict[str, Any] = {"at_a_time": self.at_a_time, "rate": self.rate, "key_variable": self.key_variable}
            engine = kept(open_named(self.where, runtime, model=self.model, flag="--judge-model", **asked))
        labelled = [LabelledAnswer(self.trait, e.prompt, e.response, e.label == "positive") for e in examples]
        return tried(engine, of_both_kinds(labelled, TRIED) or None, progress=progress)


def open_engine(
    name: EngineName = "transformers",
    *,
    loaded: LoadedModel | None = None,
    folder: Path | None = None,
    server: str | None = None,
    model: str | None = None,
    at_a_time: int = 8,
    rate: float | None = None,
    key_variable: str | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
    think: bool = False,
    batch_size: int = BATCH,
    dtype: str = "auto",
    context: int = CONTEXT,
    flag: str = "--server-model",
) -> Engine:
    """The engine ``name``, or the one behind the URL ``server``.

    transformers runs the ``loaded`` model, under whatever hooks are on it; vLLM runs the checkpoint in ``folder``, or that of
    ``loaded``; ``context`` bounds its prompts with their answers. ``model``, ``at_a_time``, ``rate`` and ``key_variable`` are a
    server's; ``flag`` is what names the model, for an error. Raises EngineError where the engine is not installed, not reached,
    or lacks its model.
    """
    if server is not None:
        client = ServerClient(server, at_a_time=at_a_time, rate=rate, key_variable=key_variable)
        return ServerEngine(client, model=model, chat_template_kwargs=chat_template_kwargs, think=think, flag=flag)
    if name not in get_args(EngineName):
        raise EngineError(
            f"there is no engine {name!r}; there are {', '.join(get_args(EngineName))}, and a server's URL"
        )
    if name == "vllm":
        place = folder or (loaded.folder if loaded is not None else None)
        if place is None:
            raise EngineError("vLLM runs checkpoints from files, and this model has none")
        adapter = loaded.adapter if loaded is not None else None
        arguments = chat_template_kwargs
        return VllmEngine(
            place, adapter=adapter, dtype=dtype, context=context, chat_template_kwargs=arguments, think=think
        )
    if loaded is None:
        raise EngineError("transformers needs a loaded model")
    return TransformersEngine(loaded, chat_template_kwargs=chat_template_kwargs, think=think, batch_size=batch_size)


def open_named(
    where: str,
    runtime: Runtime = Runtime(),  # noqa: B008
    *,
    model: str | None = None,
    at_a_time: int = 8,
    rate: float | None = None,
    key_variable: str | None = None,
    chat_template_kwargs: TemplateArguments | None = None,
    think: bool = False,
    flag: str = "--server-model",
) -> Engine:
    """The engine of a model's folder or Hub id, in this process, or of a server's URL.

    ``flag`` is as in :func:`open_engine`.
    """
    template: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "think": think}
    if is_url(where):
        return open_engine(
            server=where, model=model, at_a_time=at_a_time, rate=rate, key_variable=key_variable, flag=flag, **template
        )
    checkpoint = open_checkpoint(where)
    return TransformersEngine(load_model(checkpoint, read_spec(checkpoint), runtime), name=checkpoint.name, **template)


def check_named(
    where: str, *, model: str | None = None, flag: str = "--server-model", judging: bool = False, **asked: Any
) -> None:
    """Raise an error where an engine could not be opened, before work that takes long; no model is loaded.

    A server is asked for its models, and for one yes where it is to be ``judging``. Of a folder the headers are read. ``asked``
    are arguments of :class:`ServerClient`; the others are those of :func:`open_named`.
    """
    if not is_url(where):
        read_spec(open_checkpoint(where))
        return
    engine = ServerEngine(ServerClient(where, **asked), model=model, flag=flag)
    if judging:
        engine.yes([Request("Is two more than one? Yes or No?")])


def is_url(where: str) -> bool:
    """Whether a name is a server's URL and not a model's folder or id."""
    return where.startswith(("http://", "https://"))
