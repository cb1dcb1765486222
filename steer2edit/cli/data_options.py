"""Groups of flags for data: contrast data, statistics, vectors, chat templates.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click

from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import ModelFlags, progress_bar, read_own_neutral
from steer2edit.files.untrusted import local, parse_json
from steer2edit.options import option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from steer2edit.architecture import ModelSpec
    from steer2edit.capture.statistics import Statistics
    from steer2edit.capture.vectors import Vectors
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.data.behavior import Behavior
    from steer2edit.data.behavior_file import BehaviorFile
    from steer2edit.data.data_folder import DataFolder
    from steer2edit.data.metric_choice import MetricChoice
    from steer2edit.data.neutral import NeutralChats
    from steer2edit.data.questions import Question
    from steer2edit.runtime.model import LoadedModel


@dataclass(frozen=True)
class TemplateArgumentFlags(FlagGroup):
    """Arguments for the chat template."""

    heading: ClassVar[str] = "Data"

    chat_template_kwargs: tuple[str, ...] = option(
        (),
        "Argument for the chat template, such as enable_thinking=false; the value is JSON or text. Repeatable.",
        metavar="NAME=VALUE",
        rare=True,
    )

    @property
    def template_arguments(self) -> dict[str, Any] | None:
        """The chat template's arguments; None where none are given."""
        found: dict[str, Any] = {}
        for text in self.chat_template_kwargs:
            name, sign, value = text.partition("=")
            if not sign or not name.strip().isidentifier():
                raise click.BadParameter(
                    f"{text!r} is not of the form NAME=VALUE, such as enable_thinking=false",
                    param_hint="--chat-template-kwargs",
                )
            if name.strip() in found:
                raise click.BadParameter(f"{name.strip()} is given twice", param_hint="--chat-template-kwargs")
            found[name.strip()] = _json_or_text(value)
        return found or None


@dataclass(frozen=True)
class TemplateFlags(TemplateArgumentFlags):
    """What stands around the prompts."""

    system: str | None = option(None, "System message to put before every prompt.")


@dataclass(frozen=True)
class DataFlags(TemplateFlags):
    """Contrast data: where it comes from, and how it is read."""

    first: ClassVar[tuple[str, ...]] = ("data", "behavior", "limit")

    data: tuple[str, ...] = option(
        (),
        "Contrast data: a JSONL, JSON, CSV or Parquet file, a dataset's id on the Hub, or a folder that steer2edit data made, "
        "which brings its questions and its metric. Repeatable.",
        metavar="DATA",
    )
    behavior: tuple[str, ...] = option(
        (),
        "Behaviour, in place of --data: the name of a built-in one, or a TOML file. Repeatable.",
        metavar="NAME|FILE",
    )
    span: Literal["matched", "response", "last"] = option(
        "matched",
        "Read a pair's responses up to the shorter's length, or whole, or take the vector at their last token.",
        rare=True,
    )
    max_tokens: int = option(
        2048, "Longest example in tokens: a longer prompt is refused, a longer response is cut.", minimum=16, rare=True
    )
    background_file: Path | None = option(
        None,
        "Text unlike the behaviour, prose or chats (.jsonl), in place of the packaged text of its kind.",
        "--background",
        rare=True,
    )
    keep_file: Path | None = option(
        None,
        "Texts on which the edit has no mean effect: prose, or chats (.jsonl) of which the answers count.",
        "--keep",
    )
    batch_tokens: int = option(4096, "Tokens of one batch.", minimum=16, rare=True)
    despite_verdict: bool = option(
        False, "Take a folder of data whose own verdict is that it does not hold the behaviour.", rare=True
    )

    @property
    def most_rows(self) -> int | None:
        """How many rows are used at most; None for all."""
        return None

    @property
    def any(self) -> bool:
        """Whether contrast data is named."""
        return bool(self.data or self.behavior)

    def sources(self) -> list[BehaviorFile | DataFolder]:
        """The behaviours of --behavior, and the folders of --data: what brings questions, an instruction and a metric."""
        from steer2edit.data.behavior_file import open_behavior
        from steer2edit.data.data_folder import open_data_folder

        here = [path for source in self.data if (path := local(source)) is not None]
        folders = [open_data_folder(path) for path in here if path.is_dir()]
        return [*map(open_behavior, self.behavior), *folders]

    @property
    def metric(self) -> MetricChoice | None:
        """The metric of what is named; None where it has none, or several."""
        from steer2edit.data.metric_choice import shared_metric

        found = [source.metric for source in self.sources()]
        return shared_metric(found) if len(found) == len(self.data) + len(self.behavior) else None

    def questions(self, files: Sequence[str]) -> list[Question] | None:
        """The questions of ``files`` (--eval), or those that come with what is named; None where there are neither."""
        from steer2edit.data.questions import read_questions

        if files:
            return [question for file in files for question in read_questions(file)]
        return [question for source in self.sources() for question in source.read_questions()] or None

    def instruction(self, told: str | None) -> str | None:
        """The instruction ``told`` (--told), or those of what is named; None for none, or where one has none."""
        if told == "none":
            return None
        texts = [source.positive for source in self.sources()]
        return told or (" ".join(map(str, texts)) if texts and all(texts) else None)

    def read_behavior(self, vectors: Vectors | None = None) -> Behavior:
        """The behaviour; beside vectors from elsewhere it needs no examples."""
        from steer2edit.data.behavior import Behavior
        from steer2edit.data.data_folder import DataFolder

        arguments = self.template_arguments
        if vectors is not None and not self.any:
            name = str(vectors.source.get("name", "imported vectors"))
            return Behavior(name, (), self.system, self.span, arguments, self.max_tokens)
        if not self.any:
            raise click.UsageError("give --data, --behavior or (where there is one) --stats: exactly one of them")
        if self.data and self.behavior:
            raise click.UsageError("--data and --behavior are both given; give exactly one of them")
        read, sources = (Behavior.from_data, self.data) if self.data else (Behavior.named, self.behavior)
        if len(set(sources)) < len(sources):
            raise click.UsageError(
                f"{'--data' if self.data else '--behavior'} names the same source twice; give it once"
            )
        for source in self.sources():
            if isinstance(source, DataFolder) and not self.despite_verdict:
                source.check_verdict()
        parts = [read(source, self.system, self.span, arguments, max_tokens=self.max_tokens) for source in sources]
        behavior = Behavior.joined(parts)
        return behavior if self.most_rows is None else behavior.limited(self.most_rows)

    def read_background(self) -> str | NeutralChats | None:
        """The text or the chats of --background."""
        return read_own_neutral(self.background_file)

    def read_keep(self) -> str | NeutralChats | None:
        """The text or the chats of --keep."""
        return read_own_neutral(self.keep_file)

    def capture(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        model: ModelFlags,
        loaded: LoadedModel | None = None,
        prepared: Callable[[Behavior, LoadedModel], Behavior] | None = None,
    ) -> Statistics:
        """The data's statistics; the model is loaded once the data is known to be good.

        ``prepared`` makes of the behaviour what is captured, with the loaded model.
        """
        from steer2edit.capture.run import capture_statistics

        behavior, background, keep = self.read_behavior(), self.read_background(), self.read_keep()
        loaded = model.load(checkpoint, spec) if loaded is None else loaded
        return capture_statistics(
            loaded,
            checkpoint,
            behavior if prepared is None else prepared(behavior, loaded),
            background=background,
            texts_to_keep=keep,
            batch_tokens=self.batch_tokens,
            progress=progress_bar(),
        )


@dataclass(frozen=True)
class CaptureFlags(DataFlags):
    """Contrast data of which a part may be used."""

    limit: int | None = option(
        None, "Use at most N rows of the data; the choice depends on what is in them, not on their order.", minimum=1
    )

    @property
    def most_rows(self) -> int | None:
        """The value of --limit."""
        return self.limit


@dataclass(frozen=True)
class StatsFlags(FlagGroup):
    """Statistics in place of data."""

    heading: ClassVar[str] = "Data"

    stats: Path | None = option(None, "Statistics of an earlier capture, in place of data.")

    def check(self, data: DataFlags) -> None:
        """Raise UsageError where data is named too."""
        if self.stats is not None and data.any:
            raise click.UsageError("--stats stands in place of --data and --behavior; give one of the three")
        if self.stats is not None and data.keep_file is not None:
            raise click.UsageError("--keep is captured, and --stats are captured already: give --keep to capture")


@dataclass(frozen=True)
class VectorsFlags(FlagGroup):
    """Steering vectors in place of the captured difference."""

    heading: ClassVar[str] = "Data"

    vectors_file: Path | None = option(
        None,
        "Steering vectors made elsewhere, in place of the captured difference (see steer2edit import).",
        "--vectors",
    )
    vector: Literal["mean", "pca", "median", "gradient"] = option(
        "mean",
        "Vector of the pairs' differences: their mean, principal direction or geometric median; or one of gradients (GrAInS).",
    )

    def check(self) -> None:
        """Raise UsageError where a kind of vector is asked for beside vectors made elsewhere."""
        if self.vectors_file is not None and self.vector != "mean":
            raise click.UsageError(
                f"--vector {self.vector} is made of contrast data, and --vectors takes its place; give one of the two"
            )

    def read(self, layers: tuple[int, int] | None = None) -> Vectors | None:
        """The vectors, if any; a file's single vector goes to the first and last of the edited ``layers``, and between."""
        from steer2edit.importers import read_vectors
        from steer2edit.importers.source import Reading

        return None if self.vectors_file is None else read_vectors(self.vectors_file, Reading(edited=layers))


@dataclass(frozen=True)
class ProtectFlags(FlagGroup):
    """Directions that the edit leaves alone."""

    heading: ClassVar[str] = "Data"

    protect: tuple[str, ...] = option(
        (),
        "Direction that the edit does not write along: a behaviour (name or TOML file), statistics or vectors. Repeatable.",
        metavar="DIRECTION",
    )

    def read(self, data: TemplateFlags, flag: str = "--protect") -> tuple[Behavior | Statistics | Vectors, ...]:
        """The directions' sources, which ``flag`` names. Raises UsageError for what is neither a behaviour nor a file."""
        from steer2edit.capture.statistics import Statistics
        from steer2edit.data.behavior import Behavior
        from steer2edit.data.behavior_file import behavior_files, is_behavior
        from steer2edit.files.atomic import load_metadata
        from steer2edit.importers import read_vectors

        found: list[Behavior | Statistics | Vectors] = []
        for name in self.protect:
            if is_behavior(name):
                found.append(Behavior.named(name, data.system, chat_template_kwargs=data.template_arguments))
            elif not Path(name).expanduser().exists():
                raise click.UsageError(
                    f"{flag} {name}: there is no such file, and the built-in behaviours are {', '.join(behavior_files())}"
                )
            elif name.endswith(".safetensors") and "statistics" in load_metadata(Path(name).expanduser()):
                found.append(Statistics.load(name))
            else:
                found.append(read_vectors(name))
        return tuple(found)


def _json_or_text(value: str) -> Any:
    try:
        return parse_json(value.strip().encode("utf-8", "surrogateescape"))
    except ValueError:
        return value
