"""Data that a compile lacks.

It is made first, from a sentence or a behaviour's instructions, or taken up where it was made before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import click

from steer2edit.cli.data_options import DataFlags
from steer2edit.cli.engine_flags import AskingFlags, EngineFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.making import Making
from steer2edit.cli.making_flags import AnswerFlags, AuthorFlags, PromptFlags, WayFlags
from steer2edit.cli.options import ModelFlags
from steer2edit.options import option

Flags = TypeVar("Flags", bound=DataFlags)


@dataclass(frozen=True)
class MissingDataFlags(FlagGroup):
    """Data to make where there is none."""

    heading: ClassVar[str] = "Data"

    trait: str | None = option(
        None,
        'Trait to compile, in a sentence: "blunt: says what is wrong first, no flattery". Its data is made first, as '
        "steer2edit data makes it.",
        metavar="NAME: TEXT",
    )
    data_out: Path | None = option(
        None, "Folder of data that is made; what is there already is used.", shown_default="OUT-data, beside OUT"
    )
    answers_by: str | None = option(
        None, "Model that writes the answers of made data in MODEL's place.", metavar="MODEL|URL", shown_default="MODEL"
    )
    max_prompts: int | None = option(None, "Make data from at most N prompts.", minimum=3, rare=True)

    def with_data(
        self, data: Flags, model: str, model_flags: ModelFlags, asking: AskingFlags, out: Path, dry_run: bool
    ) -> Flags:
        """The flags of data, with the folder of made data; ``asking`` says how a server of --answers-by is asked.

        It stands in place of a trait or of a behaviour without pairs. Raises UsageError where flags contradict each other, and
        DataError where the data does not hold the behaviour.
        """
        behavior = self._without_pairs(data)
        if self.trait is None and behavior is None:
            unused = [
                ("--data-out", self.data_out),
                ("--answers-by", self.answers_by),
                ("--max-prompts", self.max_prompts),
            ]
            if flags := [name for name, value in unused if value is not None]:
                raise click.UsageError(
                    f"{flags[0]} is for data that is made: give --trait, or a behaviour without pairs"
                )
            return data
        if self.trait is not None and data.any:
            raise click.UsageError("--trait stands in place of --data and --behavior; give one of the three")
        folder = (self.data_out or out.absolute().parent / f"{out.absolute().name}-data").expanduser()
        if dry_run:
            raise click.UsageError(
                f"--dry-run makes no data: make it first (steer2edit data … -o {folder}), and give --data {folder}"
            )
        self._make(folder, behavior, data, model, model_flags, asking)
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
    ) -> None:
        from steer2edit.errors import DataError
        from steer2edit.notices import notice

        making = Making(
            model,
            WayFlags(trait=self.trait, behavior=behavior),
            PromptFlags(max_prompts=self.max_prompts),
            AnswerFlags(chat_template_kwargs=data.chat_template_kwargs),
            AuthorFlags(answers_by=self.answers_by),
            EngineFlags(at_a_time=asking.at_a_time, rate=asking.rate, key_variable=asking.key_variable),
            model_flags,
        )
        made = making.run(folder, force=False)
        kept = f"{made.tally}; {made.verdict.word}"
        notice(f"the data in {folder} is used again: {kept}" if made.reused else f"data was made in {folder}: {kept}")
        if not made.verdict.sound:
            from steer2edit.cli.data import advice

            reasons = "; ".join(made.verdict.reasons)
            raise DataError("\n".join([f"{folder} does not hold the behaviour: {reasons}", *advice(made)]))
