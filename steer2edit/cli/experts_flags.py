"""Groups of flags of the commands on mixtures of experts.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import RevisionFlags, TargetFlags, progress_bar
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.data.behavior import Behavior
    from steer2edit.runtime.model import LoadedModel


@dataclass(frozen=True)
class RankingFlags(FlagGroup):
    """How experts are ranked."""

    heading: ClassVar[str] = "Ranking"

    by: Literal["difference", "mass", "risk", "z", "alignment"] = option(
        "difference",
        "Rank experts by the difference of selection rates, routing weight, pooled rate, z-score, or output along the vector.",
    )
    scope: Literal["prompt", "response", "all"] | None = option(
        None,
        "Tokens over which routing is counted.",
        shown_default="response; prompt where the labels are of the model's own responses",
    )
    top: int = option(10, "Number of experts.", minimum=1)
    side: Literal["negative", "positive"] = option(
        "negative",
        "Class that the experts are typical of; switching off those of the negative class favours the positive.",
    )
    control: Path | None = option(None, "Statistics of a control (same topics, other behaviour) to subtract.")
    plot: Path | None = option(None, "Draw layers × experts into this PNG, SVG or PDF file.")


@dataclass(frozen=True)
class LabelFlags(FlagGroup):
    """Who labels the prompts."""

    heading: ClassVar[str] = "Labels"

    labels: Literal["data", "response"] = option(
        "data",
        "Labels of the prompts: those of the data, or whether MODEL's own answer shows the behaviour by its metric (fTRI).",
    )
    max_new_tokens: int = option(256, "Longest answer in tokens, with --labels response.", minimum=1)

    def labelled(self, behavior: Behavior, loaded: LoadedModel) -> Behavior:
        """The behaviour with the labels that are asked for; what they are is said on stderr."""
        if self.labels == "data":
            return behavior
        from steer2edit.engines.engine import Sampling
        from steer2edit.engines.opening import open_engine
        from steer2edit.experts.own_labels import SOURCE, own_labels
        from steer2edit.notices import notice

        engine = open_engine(loaded=loaded, chat_template_kwargs=behavior.chat_template_kwargs)
        found = own_labels(behavior, engine, Sampling(self.max_new_tokens), progress_bar())
        notice(str(found))
        origin = tuple({**one, "labels": SOURCE} for one in behavior.origin or ({"kind": "file"},))
        return replace(behavior, examples=found.examples, span="response", origin=origin)


@dataclass(frozen=True)
class ProfileOut(FlagGroup):
    """Where the statistics go."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Statistics file to write, *.stats.safetensors.", "-o", "--out")


@dataclass(frozen=True)
class ShowModel(RevisionFlags):
    """A model whose experts' matrices are read."""

    model: str | None = option(
        None, "Read this model's experts too, for their alignment with the vector.", metavar="MODEL"
    )


@dataclass(frozen=True)
class ChosenFlags(FlagGroup):
    """Which experts are switched, and how."""

    heading: ClassVar[str] = "Experts"

    stats: Path | None = option(None, "Statistics of a profile: experts are taken by their rank.")
    named: str | None = option(
        None,
        "Switch these experts off, in place of those of --stats: 48:176,4:143.",
        "--experts",
        metavar="LAYER:EXPERT,…",
    )
    forced: str | None = option(None, "Force these experts on: 3:5,7:12.", "--on", metavar="LAYER:EXPERT,…")
    gains: tuple[str, ...] = option(
        (), "Multiply an expert's output: 3:7=0.5. Repeatable.", "--gain", metavar="LAYER:EXPERT=FACTOR"
    )
    experts_per_token: int | None = option(None, "Number of experts that each token passes through.", minimum=1)
    prune: bool = option(False, "Remove the experts from the model: --top from every layer.")
    min_stability: float = option(
        0.5, "Leave out experts that are among the top in a smaller share of the resamples.", minimum=0, maximum=1
    )
    fdr: float | None = option(None, "Leave out experts with a larger false-discovery rate.", minimum=0, maximum=1)
    how: Literal["auto", "bias", "constant", "row", "zero"] = option(
        "auto", "Means of switching off; auto is the most exact that the family has."
    )
    max_selected: float = option(
        1e-3,
        "Share of held-out tokens that may still choose an expert masked by --how row.",
        minimum=0,
        maximum=1,
        rare=True,
    )
    calibration: Path | None = option(
        None, "Text to fit router rows on, in place of the packaged one (--how row).", rare=True
    )


@dataclass(frozen=True)
class MaskOut(FlagGroup):
    """What is written, and where."""

    heading: ClassVar[str] = "Output"

    to: str = option("checkpoint", "Format of the artefact, one of the targets below.", metavar="TARGET")
    out: Path = option(..., "Folder of the artefact.", "-o", "--out")
    plan: Path | None = option(None, "Save the plan in this file too.")
    no_measure: bool = option(False, "Run no model where none is needed, and measure no KL.")

    @classmethod
    def listed(cls) -> dict[str, list[tuple[str, str]]]:
        """The targets, each with its summary."""
        return TargetFlags.listed()
