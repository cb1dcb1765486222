"""Data that a compile lacks.

It is made first, from a sentence or a behaviour's instructions, or taken up where it was made before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import click

from steer2edit.cli.data_options import DataFlags
from steer2edit.cli.engine_flags import AskingFlags, EngineFlags, names_server
from steer2edit.cli.flags import Flag, FlagGroup
from steer2edit.cli.making import Making
from steer2edit.cli.making_flags import (
    AnswerFlags,
    AuthorFlags,
    PromptFlags,
    SamplingFlags,
    SentenceFlags,
    WayFlags,
    WriterFlags,
)
from steer2edit.cli.options import ModelFlags
from steer2edit.options import option, options_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from steer2edit.pairs.make import DataRequest

Flags = TypeVar("Flags", bound=DataFlags)
Part = TypeVar("Part", bound=FlagGroup)


@dataclass(frozen=True)
class MissingDataFlags(SentenceFlags, PromptFlags, SamplingFlags, WriterFlags):
    """Data to make where there is none: most of the flags of ``data``."""

    heading: ClassVar[str] = "Data that is made"
    first: ClassVar[tuple[str, ...]] = ("trait", "data_out", "positive", "negative", "metric", "goal", "pattern")

    data_out: Path | None = option(
        None, "Folder of data that is made; what is there already is used.", shown_default="OUT-data, beside OUT"
    )

    @classmethod
    def params(cls) -> list[Flag]:
        """The flags; those that say how answers are written are rarely needed here."""
        found = super().params()
        for one in found:
            one.rare = one.rare or one.name not in cls.first
        return found

    @property
    def any(self) -> bool:
        """Whether the behaviour is named in words."""
        return bool(self.trait or self.positive or self.negative)

    def with_data(
        self,
        data: Flags,
        model: str,
        model_flags: ModelFlags,
        asking: AskingFlags,
        out: Path,
        dry_run: bool,
        check: Callable[[DataRequest], None] = lambda asked: None,
    ) -> Flags:
        """The flags of data, with the folder of made data; ``asking`` says how a server of --answers-by is asked.

        It stands in place of a trait, of instructions or of a behaviour without pairs. ``check`` raises what is wrong with the
        work for which data is made, before it is made. Raises UsageError where flags contradict each other, and DataError where
        the data does not hold the behaviour.
        """
        behavior = self._without_pairs(data)
        if not self.any and behavior is None:
            if unused := [one.flags[0] for one in options_of(type(self)) if getattr(self, one.name) != one.default]:
                raise click.UsageError(
                    f"{unused[0]} is for data that is made: give --trait, --positive, or a behaviour without pairs"
                )
            return data
        if self.any and data.any:
            flag = "--trait" if self.trait else "--positive"
            raise click.UsageError(f"{flag} stands in place of --data and --behavior; give one of the three")
        folder = (self.data_out or out.absolute().parent / f"{out.absolute().name}-data").expanduser()
        if dry_run:
            raise click.UsageError(
                f"--dry-run makes no data: make it first (steer2edit data … -o {folder}), and give --data {folder}"
            )
        self._make(folder, behavior, data, model, model_flags, asking, check)
        return replace(data, data=(str(folder),), behavior=())

    def _without_pairs(self, data: DataFlags) -> str | None:
        """The behaviour that has no pairs; None where all have."""
        from steer2edit.data.behavior_file import open_behavior

        bare = [name for name in data.behavior if open_behavior(name).pairs is None]
        if bare and len(data.behavior) > 1:
            raise click.UsageError(
                f"--behavior {bare[0]} has no pairs, and data is made for one behaviour at a time: make it with steer2edit data"
            )
        return bare[0] if bare else None

    def _make(
        self,
        folder: Path,
        behavior: str | None,
        data: DataFlags,
        model: str,
        model_flags: ModelFlags,
        asking: AskingFlags,
        check: Callable[[DataRequest], None],
    ) -> None:
        from steer2edit.data.behavior_file import open_behavior
        from steer2edit.errors import DataError
        from steer2edit.notices import notice

        making = Making(
            model,
            replace(self._part(WayFlags), behavior=behavior),
            self._part(PromptFlags),
            replace(self._part(AnswerFlags), chat_template_kwargs=data.chat_template_kwargs),
            self._part(AuthorFlags),
            self._engine(asking),
            model_flags,
        )
        if behavior is not None and (own := open_behavior(behavior).questions) is not None:
            notice(f"held-out questions are those of the data that is made; --eval {own} takes the behaviour's own")
        made = making.run(folder, force=False, check=check)
        kept = f"{made.tally}; {made.verdict.word}"
        notice(f"the data in {folder} is used again: {kept}" if made.reused else f"data was made in {folder}: {kept}")
        if not made.verdict.sound and not data.despite_verdict:
            from steer2edit.cli.data import advice

            reasons = "; ".join(made.verdict.reasons)
            first = f"{folder} does not hold the behaviour: {reasons}. --despite-verdict takes it all the same"
            raise DataError("\n".join([first, *advice(made)]))

    def _engine(self, asking: AskingFlags) -> EngineFlags:
        """How a server that writes is asked; where none does, the flags are those of the judge alone."""
        if not (names_server(self.answers_by) or names_server(self.writer)):
            return EngineFlags()
        return EngineFlags(at_a_time=asking.at_a_time, rate=asking.rate, key_variable=asking.key_variable)

    def _part(self, kind: type[Part]) -> Part:
        """A group of the flags of ``data``, with the values that are given here."""
        own = {one.name for one in options_of(type(self))}
        return kind(**{one.name: getattr(self, one.name) for one in options_of(kind) if one.name in own})
