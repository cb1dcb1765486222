"""Groups of flags that several commands share: model, strength, target, output. Those of data are in ``data_options``.

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
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.data.neutral import NeutralChats
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
        "auto",
        "Number format of the running model; auto is the stored one, or float32 on a CPU without instructions for bfloat16.",
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
class UnquantisedFlags(FlagGroup):
    """What a plan for a quantised model is computed from."""

    heading: ClassVar[str] = "Model"

    unquantised: str | None = option(
        None,
        "Unquantised form of a quantised MODEL, folder or Hub id, to compute the plan from; MODEL itself is what runs.",
        "--weights",
        metavar="MODEL",
        shown_default="MODEL's own matrices, dequantised",
        rare=True,
    )


NEUTRAL = "Neutral text for the KL budget, prose or chats (.jsonl), in place of the packaged text of its kind."
"""The help text of --neutral."""
PENALTY = "Repetition penalty of written answers, as you serve with; 1 is none."
OWN_PENALTY = "what the model's generation_config.json names"
"""The help text of --repetition-penalty, and its default."""


@dataclass(frozen=True)
class NeutralFlags(FlagGroup):
    """The text that the KL is measured on."""

    heading: ClassVar[str] = "Strength"

    neutral: Path | None = option(None, NEUTRAL)

    def read_neutral(self) -> str | NeutralChats | None:
        """The text or the chats of --neutral."""
        return read_own_neutral(self.neutral)


KL_BUDGET = (
    "Largest mean KL from the base, in nats per token of the model's own answers to everyday prompts; the strength is the "
    "largest within it."
)


@dataclass(frozen=True)
class BudgetFlags(NeutralFlags):
    """KL budgets."""

    first: ClassVar[tuple[str, ...]] = ("strength", "kl_budget")

    kl_budget: float | None = option(None, KL_BUDGET)
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

    strength: float | None = option(None, "Multiply the method's edit by this, without running the model.")


@dataclass(frozen=True)
class SettledFlags(StrengthFlags):
    """A strength, or budgets, of which there is always one."""

    strength: float | None = option(None, "Multiply the method's edit by this; without it the KL budget decides.")
    kl_budget: float | None = option(
        None, KL_BUDGET, shown_default="0.05; 0.025 on prose, for a model that cannot answer"
    )


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

    dry_run: bool = option(False, "Say what would be read, changed, written and refused, and stop there.")
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


def read_own_neutral(path: Path | None) -> str | NeutralChats | None:
    """The text or the chats of --neutral; None without a path."""
    from steer2edit.data.neutral import read_neutral

    return None if path is None else read_neutral(path)


def read_text(path: Path | None, flag: str) -> str | None:
    """A text file's content; None without a path."""
    if path is None:
        return None
    try:
        return read_bytes(path, _TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}", param_hint=flag) from None
