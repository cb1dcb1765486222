"""Candidates of an evaluation: ways to change the loaded model, and what they are opened from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from steer2edit import targets
from steer2edit.artefact.receipt import read_receipt
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import CheckpointError, PlanError
from steer2edit.files.hub import fetch
from steer2edit.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PLAN, PLAN_FILE, RECEIPT
from steer2edit.plan import EditPlan
from steer2edit.runtime.adapters import adapted
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, Runtime, load_weights
from steer2edit.strength.kl import NeutralText, Windows


@dataclass(frozen=True)
class Candidate:
    """A way to change the model: within ``enter()`` the yielded model is changed.

    ``kind`` is base, edit, or the name of a baseline; ``note`` says in words what it is; ``seen`` are digests of the prompts
    that it was made or chosen by. ``told`` is an instruction that stands before every prompt. ``brief`` asks for the cost and
    the attribute alone, by likelihood where it can be had so. ``costs`` are what was measured of it on neutral texts already.
    """

    name: str
    enter: Callable[[], AbstractContextManager[LoadedModel]]
    kind: str = "edit"
    note: str = ""
    strength: float | None = None
    seen: frozenset[str] = frozenset()
    told: str = ""
    brief: bool = False
    costs: Mapping[NeutralText, Windows] = field(default_factory=dict)


def plan_candidate(loaded: LoadedModel, name: str, plan: EditPlan, kind: str = "edit", note: str = "") -> Candidate:
    """A plan, applied as hooks to the loaded model."""

    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        with edited(loaded, plan):
            yield loaded

    return Candidate(name, enter, kind, note, plan.measured.strength, frozenset(plan.seen))


def open_candidate(loaded: LoadedModel, checkpoint: Checkpoint, where: str, runtime: Runtime = Runtime()) -> Candidate:  # noqa: B008
    """A candidate from a plan file, an artefact or adapter folder, or another checkpoint's folder, here or on the Hub.

    Raises PlanError for what is none of these or was made for another model.
    """
    path = fetch(where)
    name = Path(where).name.removesuffix(".plan.safetensors") or str(path)
    if (path / PLAN_FILE).is_file() and not (path / RECEIPT).is_file():
        path = path / PLAN_FILE  # a plan published alone
    if path.is_file():
        plan = EditPlan.load(path)
        plan.check_base(checkpoint)
        plan.check_content(checkpoint, loaded.spec)
        return plan_candidate(loaded, name, plan, note=str(plan.method.get("name", "")))
    if not path.is_dir():
        raise PlanError(f"{where} does not exist; expected a plan, an adapter's folder or a checkpoint's folder")
    seen: tuple[str, ...] = ()
    note = ""
    if (path / RECEIPT).is_file():
        receipt = read_receipt(path)
        plan = EditPlan.load(path / PLAN)
        plan.check_base(checkpoint)
        plan.check_content(checkpoint, loaded.spec)
        seen, note = plan.seen, f"{receipt['target']}, {receipt['exactness']}"
        if not any((path / name).is_file() for name in (ADAPTER_WEIGHTS, "config.json")):
            raise PlanError(
                f"{where} is for another engine (--to {receipt['target']}), which is not run here; give its plan, {path / PLAN}"
            )
    enter = _adapter(loaded, path) if (path / ADAPTER_CONFIG).is_file() else _weights(loaded, path, runtime)
    # the folders of one compile are called after their target
    name = f"{path.resolve().parent.name}/{path.resolve().name}" if path.name in targets.names() else name
    return Candidate(name, enter, note=note, seen=frozenset(seen))


def _weights(loaded: LoadedModel, path: Path, runtime: Runtime) -> Callable[[], AbstractContextManager[LoadedModel]]:
    if not (path / "config.json").is_file():
        raise PlanError(
            f"{path} holds no config.json and no {ADAPTER_CONFIG}: it is neither a checkpoint nor an adapter"
        )

    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        other = replace(loaded, model=load_weights(path, runtime), folder=path, fingerprint=None)
        mine, theirs = (m.get_input_embeddings().weight.shape[0] for m in (loaded.model, other.model))
        if mine != theirs:
            raise CheckpointError(f"{path} has {theirs} tokens in its vocabulary, the base {mine}: not the same model")
        yield other

    return enter


def _adapter(loaded: LoadedModel, path: Path) -> Callable[[], AbstractContextManager[LoadedModel]]:
    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        with adapted(loaded.model, path):
            yield replace(loaded, adapter=path, fingerprint=None)

    return enter


def base_candidate(loaded: LoadedModel, costs: Mapping[NeutralText, Windows]) -> Candidate:
    """The model as it is; ``costs`` are what was measured of it already."""
    return Candidate("base", lambda: nullcontext(loaded), "base", costs=costs)
