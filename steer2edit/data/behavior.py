"""A behaviour: labelled examples with a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer2edit.data import contrast
from steer2edit.data.behavior_file import open_behavior
from steer2edit.data.metric_choice import MetricChoice, shared_metric
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import MAX_TOKENS, Encoded, Span, encode


@dataclass(frozen=True)
class Behavior:
    """What to compile: labelled examples, their name for cards and receipts, a system message, if any, and the span.

    ``metric`` is what the behaviour is measured by, where it says so.

    ``span`` says which tokens of a pair's responses count; see ``data.tokens.encode``. ``chat_template_kwargs`` are arguments
    for the chat template, such as ``{"enable_thinking": False}``. Of an example's tokens at most ``max_tokens`` are read.
    """

    name: str
    examples: Sequence[contrast.Example]
    system: str | None = None
    span: Span = "matched"
    chat_template_kwargs: TemplateArguments | None = None
    max_tokens: int = MAX_TOKENS
    metric: MetricChoice | None = None

    @classmethod
    def named(
        cls,
        name: str | Path,
        system: str | None = None,
        span: Span = "matched",
        chat_template_kwargs: TemplateArguments | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Behavior:
        """The pairs of a built-in behaviour, or of one in a TOML file. Raises DataError; see :func:`open_behavior`."""
        file = open_behavior(name)
        return cls(file.name, file.read_pairs(), system, span, chat_template_kwargs, max_tokens, file.metric)

    @classmethod
    def from_data(
        cls,
        source: str | Path,
        system: str | None = None,
        span: Span = "matched",
        chat_template_kwargs: TemplateArguments | None = None,
        limit: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Behavior:
        """Contrast data from a file or a Hub dataset, ``limit`` rows of it at most. Raises DataError listing every problem."""
        examples = contrast.read_contrast(source, limit)
        return cls(Path(source).stem, examples, system, span, chat_template_kwargs, max_tokens)

    @classmethod
    def joined(cls, parts: Sequence[Behavior]) -> Behavior:
        """Several behaviours as one, with the settings of the first; its name is theirs with plus signs.

        It has the metric that all of them have, if they have one.
        Rows get new numbers, because two sources count theirs alike.
        """
        examples: list[contrast.Example] = []
        for part in parts:
            start = max((example.row for example in examples), default=-1) + 1
            examples += [replace(example, row=start + example.row) for example in part.examples]
        name = " + ".join(part.name for part in parts)
        return replace(parts[0], name=name, examples=examples, metric=shared_metric(part.metric for part in parts))

    def limited(self, rows: int) -> Behavior:
        """At most ``rows`` rows of the behaviour; see :func:`data.contrast.chosen_rows`."""
        return replace(self, examples=contrast.chosen_rows(self.examples, rows, self.name))

    def encode(self, tokenizer: Any, context: int | None = None) -> list[Encoded]:
        """Tokens and response span of each example, in order; see :func:`data.tokens.encode`."""
        return encode(
            self.examples,
            tokenizer,
            system=self.system,
            span=self.span,
            max_tokens=self.max_tokens,
            context=context,
            chat_template_kwargs=self.chat_template_kwargs,
        )


def instruction(names: Sequence[str | Path]) -> str | None:
    """What a model is told to get behaviours without an edit; None for no behaviours. Raises DataError on an unknown one."""
    return " ".join(open_behavior(name).positive for name in names) or None
