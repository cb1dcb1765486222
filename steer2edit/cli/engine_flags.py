"""Groups of flags for what writes answers: an engine in this process, or a server.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click

from steer2edit.cli.flags import FlagGroup
from steer2edit.options import option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from steer2edit.engines.engine import Engine
    from steer2edit.runtime.model import LoadedModel


AT_A_TIME = 8
"""Requests to a server at a time, unless the user says otherwise."""


@dataclass(frozen=True)
class AskingFlags(FlagGroup):
    """How a server is asked."""

    heading: ClassVar[str] = "Engine"

    at_a_time: int | None = option(
        None,
        "Number of requests to a server at a time.",
        "--requests",
        minimum=1,
        shown_default=str(AT_A_TIME),
        rare=True,
    )
    rate: float | None = option(
        None, "Largest number of requests to a server per minute.", minimum=0.01, shown_default="no bound", rare=True
    )
    key_variable: str | None = option(
        None,
        "Environment variable with the key of the server.",
        "--api-key-from",
        metavar="VARIABLE",
        shown_default="STEER2EDIT_API_KEY",
        rare=True,
    )

    def asked(self) -> dict[str, Any]:
        """How a server is asked, as keyword arguments of the functions in :mod:`steer2edit.engines.opening`."""
        at_a_time = AT_A_TIME if self.at_a_time is None else self.at_a_time
        return {"at_a_time": at_a_time, "rate": self.rate, "key_variable": self.key_variable}

    def check_asked(self, places: Mapping[str, str | None]) -> None:
        """Raise UsageError where a flag says how a server is asked, and none is.

        ``places`` are the values of flags that may be a server's URL, by the flags' names.
        """
        given = {"--requests": self.at_a_time, "--rate": self.rate, "--api-key-from": self.key_variable}
        names = [name for name, value in given.items() if value is not None]
        if names and not any(map(names_server, places.values())):
            raise click.UsageError(
                f"{names[0]} says how a server is asked, and no server is: give {' or '.join(places)} with a server's URL"
            )


def check_model_name(flag: str, model: str | None, places: str, where: str | None) -> None:
    """Raise UsageError where ``flag`` names a model of a server, and no flag of ``places`` names the server."""
    if model is not None and not names_server(where):
        raise click.UsageError(f"{flag} names a model of a server; give {places} with the server's URL")


def names_server(where: str | None) -> bool:
    """Whether a flag's value is a server's URL and not a model's folder or id."""
    return where is not None and "://" in where


@dataclass(frozen=True)
class ServerFlags(FlagGroup):
    """A server that speaks the OpenAI API."""

    heading: ClassVar[str] = "Engine"

    server: str | None = option(
        None,
        "Server that writes the answers through the OpenAI API (vLLM, llama.cpp, LM Studio, a cloud), with or without /v1.",
        metavar="URL",
    )
    server_model: str | None = option(
        None, "Name of the model there.", metavar="NAME", shown_default="the only one that the server lists"
    )

    @property
    def url(self) -> str | None:
        """The server's URL, which may be given without http://."""
        return self.server if self.server is None or "://" in self.server else f"http://{self.server}"


@dataclass(frozen=True)
class EngineNameFlags(ServerFlags):
    """What writes the answers."""

    first: ClassVar[tuple[str, ...]] = ("engine", "server", "server_model")

    engine: Literal["transformers", "vllm"] = option(
        "transformers", "Program that writes the answers, where no server does."
    )

    def check_installed(self) -> None:
        """Raise EngineError where the program that writes is not installed."""
        if self.engine == "vllm":
            from steer2edit.engines.vllm_engine import import_vllm

            import_vllm()

    def check(self) -> None:
        """Raise UsageError where flags contradict each other."""
        if self.server and self.engine != "transformers":
            raise click.UsageError(f"--server and --engine {self.engine} both name what writes the answers; give one")
        if self.server_model and not self.server:
            raise click.UsageError("--server-model names a model of a server; give --server URL too")


@dataclass(frozen=True)
class EngineFlags(EngineNameFlags, AskingFlags):
    """What writes the answers, and how a server is asked."""

    def open(
        self,
        loaded: LoadedModel | None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        think: bool = False,
        **more: Any,
    ) -> Engine:
        """The engine; ``more`` are arguments of :func:`steer2edit.engines.opening.open_engine`."""
        from steer2edit.engines.opening import open_engine

        self.check()
        return open_engine(
            self.engine,
            loaded=loaded,
            server=self.server,
            model=self.server_model,
            chat_template_kwargs=chat_template_kwargs,
            think=think,
            **self.asked(),
            **more,
        )


@dataclass(frozen=True)
class NoServerFlags(FlagGroup):
    """The flag of a server, for commands that cannot use one: it is refused with the reason."""

    heading: ClassVar[str] = "Engine"

    server: str | None = option(None, "Not for this command.", metavar="URL", hidden=True)

    def check(self) -> None:
        """Raise UsageError where a server is named."""
        if self.server is not None:
            raise click.UsageError(
                "--server is not for this command: its candidates are hooks on the model in this process, and a server takes "
                "none. Work here, write the edit in a format that the server loads (--to lora, or steer2edit emit), and compare "
                "what is served by steer2edit eval MODEL --server URL --served NAME"
            )
