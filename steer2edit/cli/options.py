"""Groups of flags that several commands share, and what the library makes of their values.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click

from steer2edit import targets
from steer2edit.cli.flags import FlagGroup
from steer2edit.files.untrusted import parse_json, read_bytes
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.architecture import MatrixRole, ModelSpec
    from steer2edit.capture.statistics import Statistics
    from steer2edit.capture.vectors import Vectors
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.data.behavior import Behavior
    from steer2edit.lowering import Writing
    from steer2edit.runtime.model import LoadedModel, Runtime

_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class RevisionFlags(FlagGroup):
    """Which version of a model on the Hub."""

    heading: ClassVar[str] = "Model"

    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.", rare=True)

    def open(self, model: str) -> tuple[Checkpoint, ModelSpec]:
        """A checkpoint and its specification."""
        from steer2edit.architecture import read_spec
        from steer2edit.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(model, self.revision)
        return checkpoint, read_spec(checkpoint)


@dataclass(frozen=True)
class ModelFlags(RevisionFlags):
    """How the model runs."""

    device: str = option("auto", "Device that the model runs on: auto, cpu, cuda, cuda:N or mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Number format of the running model; auto is float32 on a CPU, and the stored format elsewhere."
    )
    device_map: str | None = option(
        None,
        "Spread a model that is larger than one device (needs accelerate): auto, or a JSON object of modules and devices.",
        rare=True,
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", rare=True)

    def runtime(self, auto: str = "auto") -> Runtime:
        """The library's setting; ``auto`` is the dtype that stands for auto."""
        from steer2edit.runtime.model import Runtime

        quieten_transformers()
        dtype = auto if self.dtype == "auto" else self.dtype
        return Runtime(self.device, dtype, self._device_map(), self.trust_remote_code)

    def load(self, checkpoint: Checkpoint, spec: ModelSpec) -> LoadedModel:
        """The running model."""
        from steer2edit.runtime.model import load_model

        return load_model(checkpoint, spec, self.runtime())

    def _device_map(self) -> Any:
        text = self.device_map
        if text is None or not text.startswith("{"):
            return text
        try:
            return parse_json(text.encode("utf-8", "surrogateescape"), unique=True)
        except ValueError as error:
            raise click.BadParameter(f"it is not a JSON object: {error}", param_hint="--device-map") from None


@dataclass(frozen=True)
class TemplateFlags(FlagGroup):
    """What stands around the prompts."""

    heading: ClassVar[str] = "Data"

    system: str | None = option(None, "System message to put before every prompt.")
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
class DataFlags(TemplateFlags):
    """Contrast data: where it comes from, and how it is read."""

    first: ClassVar[tuple[str, ...]] = ("data", "behavior", "limit")

    data: tuple[str, ...] = option(
        (),
        "Contrast data: a JSONL, JSON, CSV or Parquet file, or a dataset's id on the Hub. Repeatable.",
        metavar="DATA",
    )
    behavior: tuple[str, ...] = option(
        (), "Built-in behaviour instead: concise, truthful, formal or cautious. Repeatable.", metavar="NAME"
    )
    span: Literal["matched", "response"] = option(
        "matched", "Read a pair's responses up to the shorter's length, or whole.", rare=True
    )
    max_tokens: int = option(
        2048, "Longest example in tokens: a longer prompt is refused, a longer response is cut.", minimum=16, rare=True
    )
    background_file: Path | None = option(
        None, "Text unlike the behaviour, in place of the packaged one.", "--background", rare=True
    )
    batch_tokens: int = option(4096, "Tokens of one batch.", minimum=16, rare=True)

    @property
    def most_rows(self) -> int | None:
        """How many rows are used at most; None for all."""
        return None

    @property
    def any(self) -> bool:
        """Whether contrast data is named."""
        return bool(self.data or self.behavior)

    def read_behavior(self, vectors: Vectors | None = None) -> Behavior:
        """The behaviour; beside vectors from elsewhere it needs no examples."""
        from steer2edit.data.behavior import Behavior

        arguments = self.template_arguments
        if vectors is not None and not self.any:
            name = str(vectors.source.get("name", "imported vectors"))
            return Behavior(name, (), self.system, self.span, arguments, self.max_tokens)
        if not self.any:
            raise click.UsageError("give --data, --behavior or (where there is one) --stats: exactly one of them")
        if self.data and self.behavior:
            raise click.UsageError("--data and --behavior are both given; give exactly one of them")
        read, sources = (Behavior.from_data, self.data) if self.data else (Behavior.builtin, self.behavior)
        if len(set(sources)) < len(sources):
            raise click.UsageError(
                f"{'--data' if self.data else '--behavior'} names the same source twice; give it once"
            )
        parts = [read(source, self.system, self.span, arguments, max_tokens=self.max_tokens) for source in sources]
        behavior = Behavior.joined(parts)
        return behavior if self.most_rows is None else behavior.limited(self.most_rows)

    def read_background(self) -> str | None:
        """The text of --background."""
        return read_text(self.background_file, "--background")

    def capture(
        self, checkpoint: Checkpoint, spec: ModelSpec, model: ModelFlags, loaded: LoadedModel | None = None
    ) -> Statistics:
        """The data's statistics; the model is loaded once the data is known to be good."""
        from steer2edit.capture.run import capture_statistics

        behavior, background = self.read_behavior(), self.read_background()
        return capture_statistics(
            model.load(checkpoint, spec) if loaded is None else loaded,
            checkpoint,
            behavior,
            background=background,
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


@dataclass(frozen=True)
class VectorsFlags(FlagGroup):
    """Steering vectors in place of the captured difference."""

    heading: ClassVar[str] = "Data"

    vectors_file: Path | None = option(
        None,
        "Steering vectors made elsewhere, in place of the captured difference (see steer2edit import).",
        "--vectors",
    )

    def read(self, layers: tuple[int, int] | None = None) -> Vectors | None:
        """The vectors, if any; a file's single vector goes to the first and last of the edited ``layers``, and between."""
        from steer2edit.importers import read_vectors
        from steer2edit.importers.source import Reading

        return None if self.vectors_file is None else read_vectors(self.vectors_file, Reading(edited=layers))


@dataclass(frozen=True)
class NeutralFlags(FlagGroup):
    """The text that the KL is measured on."""

    heading: ClassVar[str] = "Strength"

    neutral: Path | None = option(None, "Text to measure the KL on, in place of the packaged one.")

    def read_neutral(self) -> str | None:
        """The text of --neutral."""
        return read_text(self.neutral, "--neutral")


@dataclass(frozen=True)
class BudgetFlags(NeutralFlags):
    """KL budgets."""

    first: ClassVar[tuple[str, ...]] = ("strength", "kl_budget")

    kl_budget: float | None = option(
        None,
        "Largest mean KL from the base on neutral text, in nats per token; the strength is the largest within it.",
        shown_default="0.05",
    )
    kl_budget_attn: float | None = option(None, "KL budget of attention's edits alone.", rare=True)
    kl_budget_mlp: float | None = option(None, "KL budget of the MLPs' edits alone.", rare=True)

    @property
    def measured(self) -> bool:
        """Whether a budget is given, which is measured by running the model."""
        return any(one is not None for one in (self.kl_budget, self.kl_budget_attn, self.kl_budget_mlp))

    @property
    def class_budgets(self) -> dict[MatrixRole, float] | None:
        """The budgets of attention and MLPs apart."""
        from steer2edit.architecture import MatrixRole

        budgets = {MatrixRole.ATTN_OUT: self.kl_budget_attn, MatrixRole.MLP_OUT: self.kl_budget_mlp}
        return {role: budget for role, budget in budgets.items() if budget is not None} or None


@dataclass(frozen=True)
class StrengthFlags(BudgetFlags):
    """A strength, or budgets."""

    strength: float | None = option(None, "Multiply the method's edit by this; without it the KL budget decides.")


@dataclass(frozen=True)
class TargetFlags(FlagGroup):
    """Formats of the artefact."""

    heading: ClassVar[str] = "Output"

    to: tuple[str, ...] = option(
        ("checkpoint",), "Format of the artefact, one of the targets below. Repeatable.", metavar="TARGET"
    )

    @classmethod
    def listed(cls) -> dict[str, list[tuple[str, str]]]:
        """The targets, each with its summary."""
        return {"Targets": [(name, targets.summary(name)) for name in targets.names()]}


@dataclass(frozen=True)
class WritingFlags(FlagGroup):
    """How files are written."""

    heading: ClassVar[str] = "Output"

    dry_run: bool = option(False, "Say what would be read, changed and written, and stop there.")
    link: bool = option(False, "Hard-link the shards that no edit touches, in place of copying them.", rare=True)
    jobs: int | None = option(
        None,
        "Number of pieces to write at a time.",
        minimum=1,
        shown_default="the number of processors, at most 4",
        rare=True,
    )

    def writing(self) -> Writing:
        """The library's setting."""
        from steer2edit.lowering import Writing

        return Writing(self.jobs, self.link)


@dataclass(frozen=True)
class ForceFlags(FlagGroup):
    """Whether an artefact may be replaced."""

    heading: ClassVar[str] = "Output"

    force: bool = option(False, "Replace an artefact that exists already.")


@dataclass(frozen=True)
class ReplaceFlags(FlagGroup):
    """Whether a file may be replaced."""

    heading: ClassVar[str] = "Output"

    force: bool = option(False, "Replace a file of the same kind that exists already.")

    def check(self, path: Path | None, kind: str) -> None:
        """Raise TargetError where ``path`` exists and may not be replaced; see :mod:`steer2edit.files.outputs`."""
        from steer2edit.files.outputs import check_new_file

        if path is not None:
            check_new_file(path, kind, self.force)


@dataclass(frozen=True)
class JsonFlags(FlagGroup):
    """How the result is printed."""

    heading: ClassVar[str] = "Output"

    as_json: bool = option(False, "Print the result as JSON.", "--json")


def read_text(path: Path | None, flag: str) -> str | None:
    """A text file's content; None without a path."""
    if path is None:
        return None
    try:
        return read_bytes(path, _TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}", param_hint=flag) from None


def numbers(text: str, flag: str) -> list[float]:
    """Numbers separated by commas; none for an empty text."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers, such as 0.5,1,2", param_hint=flag) from None


def find_plan(where: str) -> Path:
    """A plan's file, or the plan inside an artefact's folder, here or on the Hub.

    Nothing else is fetched from the Hub.
    """
    from steer2edit.files.hub import fetch
    from steer2edit.files.layout import PLAN, PLAN_FILE

    place = fetch(where, only=[PLAN, PLAN_FILE])
    if not place.is_dir():
        return place
    return next((place / name for name in (PLAN, PLAN_FILE) if (place / name).is_file()), place / PLAN)


def read_plan(where: str) -> Any:
    """A plan, here or on the Hub, alone or in an artefact's folder."""
    from steer2edit.plan import EditPlan

    return EditPlan.load(find_plan(where))


def progress_bar() -> Any:
    """The progress of commands: bars on stderr."""
    from steer2edit.progress import bar

    return bar


def quieten_transformers() -> None:
    """Switch off transformers' own bars and warnings while it loads; :mod:`foreign_warnings` still hears what is deprecated."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def _json_or_text(value: str) -> Any:
    try:
        return parse_json(value.strip().encode("utf-8", "surrogateescape"))
    except ValueError:
        return value
