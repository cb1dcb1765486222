"""A behaviour: labelled examples with a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.data import contrast
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import Encoded, Span, encode


@dataclass(frozen=True)
class Behavior:
    """What to compile: labelled examples, their name for cards and receipts, a system message, if any, and the span.

    ``span`` says which tokens of a pair's responses count; see ``data.tokens.encode``. ``chat_template_kwargs`` are arguments
    for the chat template, such as ``{"enable_thinking": False}``.
    """

    name: str
    examples: Sequence[contrast.Example]
    system: str | None = None
    span: Span = "matched"
    chat_template_kwargs: TemplateArguments | None = None

    @classmethod
    def builtin(
        cls,
        name: str,
        system: str | None = None,
        span: Span = "matched",
        chat_template_kwargs: TemplateArguments | None = None,
    ) -> Behavior:
        """A behaviour that comes with the package. Raises DataError naming the known ones."""
        return cls(name, contrast.load_behavior(name), system, span, chat_template_kwargs)

    @classmethod
    def from_data(
        cls,
        source: str | Path,
        system: str | None = None,
        span: Span = "matched",
        chat_template_kwargs: TemplateArguments | None = None,
        limit: int | None = None,
    ) -> Behavior:
        """Contrast data from a file or a Hub dataset, ``limit`` rows of it at most. Raises DataError listing every problem."""
        return cls(Path(source).stem, contrast.read_contrast(source, limit), system, span, chat_template_kwargs)

    def encode(self, tokenizer: Any) -> list[Encoded]:
        """Tokens and response span of each example, in order; see :func:`data.tokens.encode`."""
        return encode(
            self.examples,
            tokenizer,
            system=self.system,
            span=self.span,
            chat_template_kwargs=self.chat_template_kwargs,
        )
