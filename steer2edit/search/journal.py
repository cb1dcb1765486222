"""Optuna's side of a study: where its trials are kept, and which one is next.

What is proposed depends on the seed and on the trials that are finished, and on nothing else, so a search that was killed
and goes on finds what an unbroken one finds. (Workers that share a storage finish in any order; then it is only the same
search.)
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steer2edit.errors import PlanError, Steer2EditError, first_line, without_passwords

Params = dict[str, Any]
# What may differ when a study goes on: asking for more.
_FREE = ("trials", "patience")


@dataclass(frozen=True)
class Trial:
    """One plan that was tried: its parameters and, where it was measured, its row."""

    number: int
    params: Mapping[str, Any]
    state: str
    kl: float = math.nan
    attribute: Mapping[str, float] | None = None
    utility: Mapping[str, float] | None = None
    checks: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    @property
    def values(self) -> tuple[float, float] | None:
        """(attribute, utility), or None where it was not measured or breaks a metric."""
        if self.attribute is None or self.utility is None or self.state != "complete":
            return None
        return self.attribute["value"], self.utility["value"]


class Journal:
    """The trials of one study, in a journal file or in any storage of Optuna's.

    Raises Steer2EditError without Optuna or where the storage cannot be opened, PlanError where it holds a study with
    other settings.
    """

    def __init__(self, storage: str | Path, name: str, settings: Mapping[str, Any], goals: tuple[str, str]) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise Steer2EditError("tune needs Optuna: pip install 'steer2edit[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        shown = without_passwords(storage)
        self._optuna: Any = optuna
        directions: list[Any] = ["maximize" if goal == "more" else "minimize" for goal in goals]
        try:
            place: Any = storage
            if isinstance(storage, Path):
                storage.parent.mkdir(parents=True, exist_ok=True)
                place = JournalStorage(JournalFileBackend(str(storage)))
            self._study = optuna.create_study(
                study_name=name, storage=place, directions=directions, load_if_exists=True
            )
            known = self._study.user_attrs.get("settings")
        except Exception as error:  # of whatever database driver the URL names
            raise Steer2EditError(f"Optuna cannot open {shown}: {without_passwords(first_line(error))}") from None
        if known is None:
            self._study.set_user_attr("settings", dict(settings))
        elif other := [key for key in settings if key not in _FREE and known.get(key) != settings[key]]:
            lines = "; ".join(f"{key} was {known.get(key)!r} and is {settings[key]!r}" for key in other[:5])
            raise PlanError(f"{shown} holds a study with other settings: {lines}. Give another folder or study name.")
        self._bury()

    def base(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` gives of the base, in plain values; measured once in a study's life."""
        known: dict[str, Any] | None = self._study.user_attrs.get("base_measured")
        if known is None:
            known = measure()
            self._study.set_user_attr("base_measured", known)
        return known

    def finished(self) -> list[Trial]:
        """Trials that were run to their end, whatever came of them, in order."""
        return [_trial(trial) for trial in self._study.get_trials(deepcopy=False) if _is_finished(trial)]

    def ask(self, seed: int) -> Any:
        """A new trial whose ``suggest_…`` methods propose; ``seed`` is the search's."""
        done = len(self.finished())
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed * 100_003 + done, n_startup_trials=10)
        return self._begun(self._study.ask())

    def ask_point(self, grid: Mapping[str, Sequence[Any]], points: Sequence[Params]) -> Any:
        """A trial at the first of ``points`` that nobody has tried; None when all are done."""
        tried = [dict(trial.params) for trial in self.finished()]
        states = self._study.get_trials(deepcopy=False)
        running = [trial.params for trial in states if not trial.state.is_finished()]
        untried = [point for point in points if point not in tried]
        # what another worker has in hand comes last: it may have died
        left = [point for point in untried if point not in running] or untried
        if not left:
            return None
        choices = {
            key: self._optuna.distributions.CategoricalDistribution(tuple(values)) for key, values in grid.items()
        }
        self._study.enqueue_trial(left[0])
        return self._begun(self._study.ask(choices))

    def tell(self, trial: Any, result: Trial) -> None:
        """Write down what came of a trial."""
        for key, value in asdict(result).items():
            trial.set_user_attr(key, None if isinstance(value, float) and not math.isfinite(value) else value)
        values = result.values
        if values is not None and all(map(math.isfinite, values)):
            self._study.tell(trial, list(values))
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def _begun(self, trial: Any) -> Any:
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        return trial

    def _bury(self) -> None:
        """Trials that a worker of this machine left running when it was killed are given up: others take their place."""
        state = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False):
            host, _, process = str(trial.user_attrs.get("worker", "")).rpartition(":")
            if trial.state == state.RUNNING and host == socket.gethostname() and not _alive(process):
                self._study.tell(trial.number, state=state.FAIL)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def _is_finished(trial: Any) -> bool:
    return bool(trial.state.is_finished() and trial.user_attrs.get("state"))


def _trial(trial: Any) -> Trial:
    known = {key: trial.user_attrs[key] for key in Trial.__dataclass_fields__ if key != "number"}
    kl = known.pop("kl")
    return Trial(number=trial.number, kl=math.nan if kl is None else kl, **known)
