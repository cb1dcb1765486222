"""What a target's module states, and the values that its functions give.

A target is one file in ``targets/``. It states everything about itself; the command line, ``emit``, ``verify``, the model
card, the report and ``push`` ask the module, and know no target by name.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from steer2edit.lowering.resolve import Lowering, Resolved, Writing
from steer2edit.lowering.rounding import Rounding
from steer2edit.plan import Base, EditPlan
from steer2edit.progress import Progress

HERE = "path/to/this/folder"
"""Stands in a snippet for the repository's name until there is one."""
_BASE = "path/to/the/base"


@dataclass(frozen=True)
class HubEntry:
    """How the Hub files an artefact: description, relation to the base, library, and tags.

    The library is the one that loads it.
    """

    description: str
    relation: Literal["finetune", "adapter", "quantized", "merge"]
    library: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where an artefact and its base lie, for a snippet that loads them.

    ``repository`` is the artefact's name on the Hub. ``auto_class`` is the automatic class of transformers that loads the
    base. ``folder`` is the artefact's, and ``base_folder`` that of a base that is not on the Hub, where these are known.
    """

    base: Base
    repository: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    folder: str | None = None
    base_folder: str | None = None

    @property
    def name(self) -> str:
        """What a loader is given: the repository, or words that stand for the folder."""
        return self.repository or self.folder or HERE

    def file(self, name: str) -> str:
        """A file of the artefact, quoted for a shell.

        It has its folder where that is known and nothing is downloaded.
        """
        return shlex.quote(f"{self.folder}/{name}") if self.folder and not self.repository else name

    @property
    def quoted(self) -> str:
        """The name as a string of Python."""
        return json.dumps(self.name, ensure_ascii=False)

    @property
    def published(self) -> bool:
        """Whether the base is on the Hub, so that others can load it by its name."""
        return self.base.revision is not None

    @property
    def base_name(self) -> str:
        """What a loader of the base is given."""
        return self.base.name if self.published else self.base_folder or _BASE

    @property
    def quoted_base(self) -> str:
        """What a loader of the base is given, as Python's arguments: its name, and the revision, if it has one."""
        revision = f", revision={json.dumps(self.base.revision)}" if self.published else ""
        return json.dumps(self.base_name, ensure_ascii=False) + revision


@dataclass(frozen=True)
class Snippet:
    """How an artefact is loaded: lines of Python or of a shell, and a sentence below them."""

    language: Literal["python", "console"]
    lines: tuple[str, ...]
    remark: str = ""


@dataclass(frozen=True)
class Comparison:
    """The result of a byte-for-byte check.

    ``files`` are the names that belong to the artefact and were compared; ``lowering`` is what base and plan give, for the
    receipt's claims; ``tensors`` counts what was compared; ``notes`` are remarks that are not problems.
    """

    tensors: int
    files: frozenset[str]
    lowering: Lowering
    problems: tuple[str, ...] = ()
    rounding: tuple[Rounding, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WholeModel:
    """A loader reads the folder as a model."""

    folder: Path


@dataclass(frozen=True)
class PeftAdapter:
    """A loader puts the folder's PEFT adapter on the base."""

    folder: Path


@dataclass(frozen=True)
class AppliedPlan:
    """An engine adds to the base what this plan says. The plan was read back from the artefact's file."""

    plan: EditPlan


@dataclass(frozen=True)
class StreamShift:
    """An engine adds a vector ``[hidden]`` to the residual stream after each named block.

    It is an approximation of the plan, unless the plan is such vectors and ``exact`` says so.
    """

    vectors: Mapping[int, torch.Tensor]
    exact: bool = False


Loadable = WholeModel | PeftAdapter | AppliedPlan | StreamShift


class Target(Protocol):
    """The names that a target's module has.

    ``SUMMARY`` is one line for help texts, a plain string. ``WHOLE_MODEL`` is whether the artefact is a model by itself;
    ``STRUCTURE`` whether it can carry a plan that removes experts.
    """

    SUMMARY: str
    HUB: HubEntry
    WHOLE_MODEL: bool
    STRUCTURE: bool

    def check(self, resolved: Resolved) -> None:
        """Raise TargetError for what the target cannot express. Reads no matrix and writes nothing: dry runs ask it too."""

    def lower(self, resolved: Resolved, folder: Path, writing: Writing, progress: Progress) -> Lowering:
        """Write the artefact's own files into ``folder``.

        Raises what ``check`` raises, and TargetError for values that do not fit.
        """

    def verify(self, resolved: Resolved, folder: Path, progress: Progress) -> Comparison:
        """Compare the artefact in ``folder`` with what base and plan give. Runs no model."""

    def loadable(self, resolved: Resolved, folder: Path) -> Loadable:
        """What a loader makes of ``folder``. ``verify`` compares its logits with those of base and plan."""

    def load_snippet(self, place: Place) -> Snippet:
        """How people load the artefact."""

    def loading_files(self, folder: Path, names: Sequence[str]) -> set[str]:
        """Those of the artefact's files ``names`` that loading needs: only these are published."""


MEMBERS = (
    *("SUMMARY", "HUB", "WHOLE_MODEL", "STRUCTURE"),
    *("check", "lower", "verify", "loadable", "load_snippet", "loading_files"),
)
