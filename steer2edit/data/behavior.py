"""A behaviour: labelled examples with a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steer2edit.data import contrast
from steer2edit.data.tokens import Span


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
