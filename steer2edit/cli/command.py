"""The classes of commands: groups of flags under headings, single flags given once, and errors as one message."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from steer2edit.cli.flags import Flag, FlagGroup
from steer2edit.cli.foreign_warnings import holding_warnings
from steer2edit.errors import Steer2EditError, first_line, printable
from steer2edit.notices import collected
from steer2edit.runtime.launch import process_of

_PATH_ERRNOS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR}
_RARE = "Rarely needed"
_COLUMN = 26


class Command(click.Command):
    """A command whose flags come in groups: its function gets each group as one value, under the name in ``groups``."""

    def __init__(self, *args: Any, groups: Mapping[str, type[FlagGroup]] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.groups = dict(groups or {})

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Arguments, and the flags of all groups; asked for anew each time, so that a new method's options are there."""
        flags = [flag for group in self.groups.values() for flag in group.params()]
        return [*self.params, *flags, *([help_option] if (help_option := self.get_help_option(ctx)) else [])]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse a flag that takes one value and is given several: the last would win unsaid."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        counts = Counter(id(param) for param in order)
        for param in order:
            if isinstance(param, click.Option) and counts[id(param)] > 1 and not param.multiple and not param.is_flag:
                raise click.UsageError(
                    f"{param.opts[-1]} is given {counts[id(param)]} times, and takes one value; give it once", ctx
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Hand each group's values to the function as one value."""
        for name, group in self.groups.items():
            ctx.params[name] = group.take(ctx.params)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Flags under the headings of their groups, in the groups' order; those that are rarely needed last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        rare: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is None:
                continue
            if isinstance(param, Flag) and param.rare:
                rare.append(record)
            else:
                sections.setdefault(param.heading if isinstance(param, Flag) else "", []).append(record)
        # click's own --help joins the last section
        rest = sections.pop("", [])
        if rare:
            sections[_RARE] = rare
        last = list(sections)[-1] if sections else "Options"
        sections[last] = [*sections.get(last, []), *rest]
        for group in self.groups.values():
            sections |= group.listed()
        for heading, records in sections.items():
            with formatter.section(heading):
                # one width for all sections
                formatter.write_dl([(names.ljust(_COLUMN), text) for names, text in records], col_max=_COLUMN)


class CommandGroup(click.Group):
    """A group of commands, listed under headings. Errors of the library become one message and exit code 2."""

    command_class = Command

    def __init__(self, *args: Any, headings: Mapping[str, tuple[str, ...]] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.headings = dict(headings or {})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands under their headings, each in the order of use."""
        if not self.headings:
            super().format_commands(ctx, formatter)
            return
        width = formatter.width - 6 - max(map(len, self.commands))
        for heading, names in self.headings.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])


@contextmanager
def _foreign_errors() -> Iterator[None]:
    """Turn the system's refusal of a path, and a panic of a library in Rust, into an error of ours.

    A path is refused that has a name that is too long, or lies in a folder that may not be read.
    """
    try:
        yield
    except BaseException as error:
        # a panic of a library written in Rust, such as safetensors or tokenizers, is no Exception
        if type(error).__name__ == "PanicException":
            raise Steer2EditError(f"a library stopped at this input: {first_line(error)}; is a file damaged?") from None
        if not isinstance(error, OSError) or error.errno not in _PATH_ERRNOS or error.filename is None:
            raise
        path = os.fsdecode(error.filename)
        raise Steer2EditError(
            f"cannot use {path if len(path) <= 200 else f'{path[:200]}…'}: {error.strerror}"
        ) from None


class MainGroup(CommandGroup):
    """The whole command line: what a user did wrong is said once, also where several processes meet it."""

    def invoke(self, ctx: click.Context) -> Any:
        process = process_of(os.environ)
        first = process is None or process.rank == 0
        try:
            say = lambda text: click.echo(printable(f"note: {text}"), err=True) if first else None  # noqa: E731
            with collected(say), holding_warnings(), _foreign_errors():
                return super().invoke(ctx)
        except (Steer2EditError, click.ClickException) as error:
            if process is not None and process.rank > 0:
                # process 0 says it; torchrun ends all of them as soon as one has failed
                time.sleep(1)
            elif isinstance(error, click.ClickException):
                raise
            else:
                click.echo(printable(f"Error: {error}"), err=True)
            sys.exit(2)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        process = process_of(os.environ)
        if process is not None and name != "capture":
            raise click.UsageError(
                f"{name} runs in one process, and this is one of {process.size}: capture over all of them "
                f"(torchrun … -m steer2edit capture), then start {name} by itself with --stats"
            )
        return name, command, rest


def command(
    name: str | None = None, *, cls: type[Command] = Command, **groups: type[FlagGroup]
) -> Callable[[Callable[..., None]], Command]:
    """A command of a function whose keyword arguments are the groups of flags."""
    return click.command(name, cls=cls, groups=groups)
