"""The pipeline on one page: contrast data → statistics → plan → strength → artefacts. Read this first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer2edit import methods, targets
from steer2edit.architecture import Role, read_spec
from steer2edit.capture.resume import EVERY_SECONDS
from steer2edit.capture.run import capture
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data import contrast
from steer2edit.data.questions import Question
from steer2edit.data.records import prompt_digest
from steer2edit.data.tokens import Encoded, Span, encode, windows
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.files.atomic import check_new
from steer2edit.files.locks import claimed
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.by_layer import Layers
from steer2edit.runtime.distributed import ALONE, World
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.mean_effect import record_push
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import Divergence, NeutralText, Strength, find_strength, quadratic_start
from steer2edit.targets import Lowering

if TYPE_CHECKING:
    from steer2edit.evaluation.evaluate import Evaluation

KL_BUDGET = 0.05
METHOD = "steering"
BACKGROUND_TOKENS = 8192


@dataclass(frozen=True)
class Behavior:
    """What to compile: labelled examples, their name for cards and receipts, a system message, if any, and the span.

    ``span`` says which tokens of a pair's responses count; see ``data.tokens.encode``.
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
    evaluation: Evaluation | None = None


def compile(
    model: str | Path,
    behavior: Behavior | Statistics,
    out: str | Path,
    *,
    vectors: Vectors | None = None,
    to: Sequence[str] = ("checkpoint",),
    revision: str | None = None,
    method: str = METHOD,
    options: Any = None,
    strength: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[Role, float] | None = None,
    neutral: str | Sequence[str] | None = None,
    background: str | Sequence[str] | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
    batch_tokens: int = 4096,
    questions: Sequence[Question] | None = None,
    force: bool = False,
    writing: targets.Writing = targets.Writing(),  # noqa: B008
    progress: Progress = silent,
) -> Compiled:
    """Compile a behaviour into ``model``'s weights.

    ``strength`` multiplies the method's edit; without it, the largest is taken whose measured mean KL on neutral text (nats
    per token) is within ``kl_budget``, 0.05 unless given. With one target ``out`` is its folder, with several a folder for
    each inside.
    With ``vectors`` from elsewhere these take the place of the captured difference, and a behaviour without examples will do.
    ``options`` is the method's own Options. Statistics of an earlier capture may stand for the behaviour. With held-out
    ``questions`` the edit is also measured, beside activation steering and a random direction, and each artefact gets
    the evaluation and a report page. No other run can write the folders meanwhile. Raises a Steer2EditError for whatever is
    wrong with the input.
    """
    folders = artefact_folders(out, to, force)
    with claimed(folders.values()):
        checkpoint = open_checkpoint(model, revision)
        spec = read_spec(checkpoint)
        if vectors is not None:
            vectors.check(spec)
        if not writing.link:
            # hours of work are not to end at a full disk
            from steer2edit.dry_run import check_rooms

            check_rooms(checkpoint, spec, folders, method, options, writing)
        loaded = load_model(checkpoint, spec, runtime)
        if isinstance(behavior, Statistics):
            statistics = behavior
        else:
            statistics = capture_statistics(
                loaded, checkpoint, behavior, background=background, batch_tokens=batch_tokens, progress=progress
            )
        if vectors is not None:
            statistics = substituted(vectors, statistics, checkpoint, spec)
        scoring = Scoring(checkpoint, spec, statistics)
        plan = make_plan(scoring, method=method, options=options, progress=progress)
        text = neutral_text(loaded, neutral, progress)
        plan = settle_strength(
            loaded, plan, strength=strength, kl_budget=kl_budget, class_budgets=class_budgets, neutral=text
        )

        lowerings = {
            target: targets.emit(
                plan, checkpoint, spec, target, folder, force=force, writing=writing, progress=progress
            )
            for target, folder in folders.items()
        }
        if questions is None:
            return Compiled(plan, statistics, folders, lowerings)
        from steer2edit.evaluation.assess import prove

        evaluation = prove(loaded, scoring, plan, text, questions, folders, progress)
        return Compiled(plan, statistics, folders, lowerings, evaluation)


def capture_statistics(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    behavior: Behavior,
    *,
    background: str | Sequence[str] | None = None,
    batch_tokens: int = 4096,
    world: World = ALONE,
    keep: Path | None = None,
    keep_every: float = EVERY_SECONDS,
    layers: Layers | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Run the model over the behaviour's examples and ``background`` text once; the result remembers of what it is.

    The background stands for everything else the model may read; without one the packaged English text is taken. Without
    examples it is captured alone, for vectors from elsewhere.
    ``world``, ``keep``, ``keep_every`` and ``layers`` are those of :func:`capture.capture`.
    """
    texts = contrast.background_text() if background is None else background
    texts = [texts] if isinstance(texts, str) else list(texts)
    source = {
        "name": behavior.name,
        "data": contrast.data_hash(behavior.examples),
        "system": behavior.system,
        "span": behavior.span,
        "background": hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest(),
        "prompts": sorted({prompt_digest(example.prompt) for example in behavior.examples}),
        "fingerprint": checkpoint.fingerprint,
        "model": checkpoint.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }

    def encoded() -> list[Encoded]:
        found = encode(behavior.examples, loaded.tokenizer, system=behavior.system, span=behavior.span)
        neutral = windows(loaded.tokenizer, texts, BACKGROUND_TOKENS, min(256, loaded.context))
        return found + [Encoded(tuple(ids), 1, "neutral", row) for row, ids in enumerate(neutral)]

    examples = world.together(encoded)
    return capture(
        loaded,
        examples,
        batch_tokens=batch_tokens,
        source=source,
        world=world,
        keep=keep,
        keep_every=keep_every,
        layers=layers,
        progress=progress,
    )


def make_plan(
    scoring: Scoring,
    *,
    method: str = METHOD,
    options: Any = None,
    progress: Progress = silent,
) -> EditPlan:
    """Score every component and lay down the edits; reads each writer once, and runs no model.

    Raises PlanError where the statistics are of another model.
    """
    checkpoint, statistics = scoring.checkpoint, scoring.statistics
    theirs = statistics.source.get("fingerprint")
    if theirs != checkpoint.fingerprint:
        raise PlanError(
            f"the statistics are of {statistics.source.get('model')} (fingerprint {str(theirs)[:12]}), but {checkpoint.name} "
            f"has the fingerprint {checkpoint.fingerprint[:12]}; capture them from this model"
        )
    module = methods.load(method)
    plan: EditPlan = module.plan(scoring, module.Options() if options is None else options, progress)
    plan = record_push(plan, scoring.spec, statistics)
    checkpoint.check_unchanged()
    return replace(plan, data=describe_data(statistics))


def describe_data(statistics: Statistics) -> dict[str, Any]:
    """What a plan says of the data behind it. Plans are published: of texts they hold digests only."""
    described = {key: statistics.source.get(key) for key in ("name", "data", "system", "span", "background", "prompts")}
    if described["system"] is not None:
        described["system"] = prompt_digest(described["system"])
    if "vectors" in statistics.source:
        described["vectors"] = statistics.source["vectors"]
    return {**described, "examples": dict(statistics.examples), "tokens": dict(statistics.tokens)}


def settle_strength(
    loaded: LoadedModel,
    plan: EditPlan,
    *,
    strength: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[Role, float] | None = None,
    neutral: NeutralText,
) -> EditPlan:
    """The plan at ``strength``, or at the largest one within ``kl_budget``, with what was measured written into it.

    ``class_budgets`` give attention and MLPs each a KL of their own, measured with the other class switched off; a budget
    of 0 leaves a class out. ``kl_budget`` then bounds them together, where it is given. Raises PlanError where the plan
    edits a class that has no budget.
    """
    if strength is not None and not math.isfinite(strength):
        raise PlanError(f"--strength is {strength}, expected a finite number")
    if not plan.edits and not plan.structure:
        raise Steer2EditError(
            "the plan edits nothing: every score is under its threshold, or no score's sign is stable; lower rho, raise "
            "--top-heads/--top-neurons, give more examples, or --all-components"
        )
    classes: dict[str, Any] = {}
    if class_budgets is not None:
        plan, classes = _settle_classes(loaded, plan, class_budgets, neutral)
    elif kl_budget is None and strength is None:
        kl_budget = KL_BUDGET

    def measure(factor: float) -> Divergence:
        with edited(loaded, plan, factor):
            return neutral.measure()

    if strength is not None or kl_budget is None:
        fixed = 1.0 if strength is None else strength
        found = Strength(fixed, measure(fixed), ())
        kl_budget = None
    else:
        found = find_strength(measure, kl_budget, start=_start(loaded, plan, neutral, kl_budget))
    measured = {
        "strength": found.strength,
        "kl_budget": kl_budget,
        **({"classes": classes} if classes else {}),
        **asdict(found.divergence),
        "steps": [list(step) for step in found.steps],
    }
    return replace(plan.scaled(found.strength), measured={**plan.measured, **measured})


def _settle_classes(
    loaded: LoadedModel, plan: EditPlan, budgets: Mapping[Role, float], neutral: NeutralText
) -> tuple[EditPlan, dict[str, Any]]:
    roles = {name: site.role.kind for name, site in loaded.spec.owners.items()}
    found: dict[str, Any] = {}
    factors: dict[Role, float] = {}
    for role in sorted({roles[edit.tensor] for edit in plan.edits if edit.tensor in roles}):
        name = "attn" if role is Role.ATTN_OUT else "mlp"
        if role not in budgets:
            raise PlanError(f"the plan edits {name} writers too: give --kl-budget-{name} (0 leaves them out)")
        factors[role] = 0.0
        if budgets[role] > 0:
            part = replace(plan, edits=tuple(edit for edit in plan.edits if roles.get(edit.tensor) is role))

            def measure(factor: float, part: EditPlan = part) -> Divergence:
                with edited(loaded, part, factor):
                    return neutral.measure()

            settled = find_strength(measure, budgets[role], start=_start(loaded, part, neutral, budgets[role]))
            factors[role] = settled.strength
            found[name] = {"strength": settled.strength, "kl_budget": budgets[role], "kl": settled.divergence.kl}
    tensors = {tensor: factors.get(role, 1.0) for tensor, role in roles.items()}
    keys = {site.key: factors.get(site.role.kind, 1.0) for site in loaded.spec.sites}
    return plan.reweighted(tensors, keys), found


def _start(loaded: LoadedModel, plan: EditPlan, neutral: NeutralText, budget: float) -> float:
    def glance(factor: float) -> Divergence:
        with edited(loaded, plan, factor):
            return neutral.measure(glance=True)

    return quadratic_start(glance, budget)


def neutral_text(
    loaded: LoadedModel, text: str | Sequence[str] | None = None, progress: Progress = silent
) -> NeutralText:
    """The text on which the KL is measured; the packaged one if there is none."""
    return NeutralText(loaded, contrast.neutral_text() if text is None else text, progress=progress)


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
