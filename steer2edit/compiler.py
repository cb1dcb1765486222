"""The pipeline on one page: contrast data → statistics → plan → strength → artefacts. Read this first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steer2edit import contrast, methods, targets
from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.capture import capture
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.divergence import Divergence, NeutralText, Strength, find_strength
from steer2edit.encoding import Span, encode
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.files import check_new
from steer2edit.model import LoadedModel, Runtime, edited, load_model
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.statistics import Statistics
from steer2edit.targets import Lowering

KL_BUDGET = 0.05
METHOD = "steering"


@dataclass(frozen=True)
class Behavior:
    """What to compile: labelled examples, their name for cards and receipts, a system message, if any, and the span.

    ``span`` says which tokens of a pair's responses count; see ``encoding.encode``.
    """

    name: str
    examples: Sequence[contrast.Example]
    system: str | None = None
    span: Span = "matched"

    @classmethod
    def builtin(cls, name: str, system: str | None = None, span: Span = "matched") -> Behavior:
        """A behaviour that comes with the package. Raises DataError naming the known ones."""
        return cls(name, contrast.load_behavior(name), system, span)

    @classmethod
    def from_data(cls, source: str | Path, system: str | None = None, span: Span = "matched") -> Behavior:
        """Contrast data from a file or a Hub dataset. Raises DataError listing every problem."""
        return cls(Path(source).stem, contrast.read_contrast(source), system, span)


@dataclass(frozen=True)
class Compiled:
    """What a compile gave: the plan, and each target's folder and lowering."""

    plan: EditPlan
    statistics: Statistics
    artefacts: dict[str, Path]
    lowerings: dict[str, Lowering]


def compile(
    model: str | Path,
    behavior: Behavior | Statistics,
    out: str | Path,
    *,
    to: Sequence[str] = ("checkpoint",),
    revision: str | None = None,
    method: str = METHOD,
    options: Any = None,
    strength: float | None = None,
    kl_budget: float = KL_BUDGET,
    neutral_text: str | Sequence[str] | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
    batch_tokens: int = 4096,
    force: bool = False,
    progress: Progress = silent,
) -> Compiled:
    """Compile a behaviour into ``model``'s weights.

    ``strength`` multiplies the method's edit; without it, the largest is taken whose measured mean KL on neutral text (nats
    per token) is within ``kl_budget``. With one target ``out`` is its folder, with several a folder for each inside.
    ``options`` is the method's own Options. Statistics of an earlier capture may stand for the behaviour. Raises a
    Steer2EditError for whatever is wrong with the input.
    """
    folders = artefact_folders(out, to, force)
    checkpoint = open_checkpoint(model, revision)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, runtime)
    if isinstance(behavior, Statistics):
        statistics = behavior
    else:
        statistics = capture_statistics(loaded, checkpoint, behavior, batch_tokens=batch_tokens, progress=progress)
    plan = make_plan(checkpoint, spec, statistics, method=method, options=options, progress=progress)
    plan = settle_strength(
        loaded, plan, strength=strength, kl_budget=kl_budget, neutral_text=neutral_text, progress=progress
    )

    lowerings = {
        target: targets.emit(plan, checkpoint, spec, target, folder, force=force, progress=progress)
        for target, folder in folders.items()
    }
    return Compiled(plan, statistics, folders, lowerings)


def capture_statistics(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    behavior: Behavior,
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> Statistics:
    """Run the model over the behaviour's examples once; the result remembers of what it is."""
    source = {
        "name": behavior.name,
        "data": contrast.data_hash(behavior.examples),
        "system": behavior.system,
        "span": behavior.span,
        "fingerprint": checkpoint.fingerprint,
        "model": checkpoint.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    encoded = encode(behavior.examples, loaded.tokenizer, system=behavior.system, span=behavior.span)
    return capture(loaded, encoded, batch_tokens=batch_tokens, source=source, progress=progress)


def make_plan(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    statistics: Statistics,
    *,
    method: str = METHOD,
    options: Any = None,
    progress: Progress = silent,
) -> EditPlan:
    """Score every component and lay down the edits; reads each writer once, and runs no model.

    Raises PlanError where the statistics are of another model.
    """
    theirs = statistics.source.get("fingerprint")
    if theirs != checkpoint.fingerprint:
        raise PlanError(
            f"the statistics are of {statistics.source.get('model')} (fingerprint {str(theirs)[:12]}), but {checkpoint.name} "
            f"has the fingerprint {checkpoint.fingerprint[:12]}; capture them from this model"
        )
    module = methods.load(method)
    plan: EditPlan = module.plan(
        checkpoint, spec, statistics, module.Options() if options is None else options, progress
    )
    described = {key: statistics.source.get(key) for key in ("name", "data", "system", "span")}
    return replace(plan, data={**described, "examples": dict(statistics.examples), "tokens": dict(statistics.tokens)})


def settle_strength(
    loaded: LoadedModel,
    plan: EditPlan,
    *,
    strength: float | None = None,
    kl_budget: float = KL_BUDGET,
    neutral_text: str | Sequence[str] | None = None,
    progress: Progress = silent,
) -> EditPlan:
    """The plan at ``strength``, or at the largest one within ``kl_budget``, with what was measured written into it."""
    if strength is not None and not math.isfinite(strength):
        raise PlanError(f"--strength is {strength}, expected a finite number")
    if not plan.edits:
        raise Steer2EditError(
            "the plan edits nothing: every score is under its threshold; lower rho or raise --top-heads/--top-neurons"
        )
    neutral = NeutralText(loaded, contrast.neutral_text() if neutral_text is None else neutral_text, progress=progress)

    def measure(factor: float) -> Divergence:
        with edited(loaded, plan, factor):
            return neutral.measure()

    found = find_strength(measure, kl_budget) if strength is None else Strength(strength, measure(strength), ())
    measured = {
        "strength": found.strength,
        "kl_budget": kl_budget if strength is None else None,
        **asdict(found.divergence),
        "steps": [list(step) for step in found.steps],
    }
    return replace(plan.scaled(found.strength), measured=measured)


def artefact_folders(out: str | Path, to: Sequence[str], force: bool) -> dict[str, Path]:
    """Where each target goes. Raises TargetError, before any work is done, where that is taken."""
    chosen = list(dict.fromkeys(to))
    for target in chosen:
        targets.load(target)
    out = Path(out).expanduser()
    folders = {target: out if len(chosen) == 1 else out / target for target in chosen}
    for folder in folders.values():
        check_new(folder, force)
    return folders
