"""One operator: what it is, the command that compiles it, and the hooks that do the same at run time."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from operator_rows.subject import Subject
from steer2edit.capture.affine_maps import contrast_runs
from steer2edit.capture.attribution import by_gradients
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vector_kinds import VectorKind, with_vector
from steer2edit.capture.vectors import substituted
from steer2edit.cli.compile import compile as compile_command
from steer2edit.cli.data_options import CaptureFlags, VectorsFlags
from steer2edit.cli.method import MethodFlags
from steer2edit.data.tokens import Span
from steer2edit.methods import make_plan, runs_the_model
from steer2edit.plan import EditPlan
from steer2edit.scoring.scores import Scoring

Hook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A module's output as the hook changes it, of its input and its output."""
EXACT = 1e-4
"""The largest error of an exact operator, as a share of what the hooks do: the noise of float32."""
ADAPTERS: Mapping[str, float] = dict.fromkeys(("checkpoint", "lora", "gguf", "mlx"), EXACT)
"""Targets that carry low-rank edits of matrices."""
MEAN_EFFECT: Mapping[str, float] = {"gguf-vector": 2.0}
"""The target that carries an edit's mean effect alone, at every token: an approximation of most operators."""
ABSENT: Mapping[str, frozenset[str]] = {"gpt2": frozenset({"mlx"})}
"""Targets whose engine does not know a model type, whatever the operator."""


def planned(subject: Subject, command: str) -> EditPlan:
    """What ``steer2edit compile MODEL --behavior … COMMAND`` plans at strength 1, of the subject's behaviour."""
    words = ["MODEL", "--behavior", "concise", "--out", "OUT", *shlex.split(command)]
    values = dict(compile_command.make_context("compile", words).params)
    flags = MethodFlags.take(values)
    statistics = steered(subject, CaptureFlags.take(values).span, VectorsFlags.take(values).vector)
    runs = contrast_runs(subject.loaded, subject.behavior) if runs_the_model(flags.method) else None
    scoring = Scoring(subject.checkpoint, subject.spec, statistics, runs)
    return make_plan(scoring, method=flags.method, options=flags.options())


def steered(subject: Subject, span: Span, vector: VectorKind) -> Statistics:
    """The subject's statistics with the vector that ``--span`` and ``--vector`` give."""
    statistics = subject.captured(span)
    if vector != "gradient":
        return with_vector(statistics, vector)
    if span not in subject.gradients:
        examples = replace(subject.behavior, span=span).encode(subject.loaded.tokenizer, subject.loaded.context)
        subject.gradients[span] = by_gradients(subject.loaded, examples)
    return substituted(subject.gradients[span], statistics, subject.checkpoint, subject.spec)


@dataclass(frozen=True)
class Row:
    """One operator of one system.

    ``operator`` is its formula, ``command`` the flags of ``compile`` that give it, ``hook`` how the paper does it at run time.
    ``hooks`` gives, of a subject, the same by module: written from the formula, not from the plan. ``carried`` holds the targets
    that carry it, each with the largest error of its logits as a share of what the hooks do; every other target refuses the
    plan. ``exactness`` says in words what is exact. ``families`` are the tiny models it is tried on; ``plan`` makes the plan
    where no flags of ``compile`` do.
    """

    system: str
    operator: str
    command: str
    hook: str
    hooks: Callable[[Subject], Mapping[str, Hook]]
    exactness: str = "exact"
    carried: Mapping[str, float] = field(default_factory=lambda: ADAPTERS)
    families: tuple[str, ...] = ("llama", "gpt2")
    plan: Callable[[Subject], EditPlan] | None = None

    @property
    def name(self) -> str:
        """A short name for tests."""
        return f"{self.system}: {self.command}"

    def carriers(self, family: str) -> Mapping[str, float]:
        """The targets that carry the operator in a model type, with the largest error."""
        return {target: error for target, error in self.carried.items() if target not in ABSENT.get(family, ())}

    @property
    def carried_text(self) -> str:
        """The targets that carry the operator, in words; those by approximation last."""
        exact = [target for target, error in self.carried.items() if error <= EXACT]
        others = [f"{target} (approximate)" for target, error in self.carried.items() if error > EXACT]
        return ", ".join([*exact, *others])

    def planned(self, subject: Subject) -> EditPlan:
        """The plan of the row's command."""
        return planned(subject, self.command) if self.plan is None else self.plan(subject)


def along(vector: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The part of a vector [..., n] along ``vector`` [n]."""
    unit = vector / vector.norm()
    return lambda y: (y @ unit)[..., None] * unit


def pushing(a: torch.Tensor, v: torch.Tensor) -> Hook:
    """The output with ``(a · x) v`` added."""
    return lambda x, y: y + (x @ a)[..., None] * v


def adding(v: torch.Tensor) -> Hook:
    """The output with ``v`` added at every token."""
    return lambda _x, y: y + v
