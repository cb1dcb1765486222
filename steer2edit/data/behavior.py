"""A behaviour: labelled examples with a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer2edit.data import contrast
from steer2edit.data.behavior_file import BehaviorFile, open_behavior
from steer2edit.data.data_folder import DataFolder, open_data_folder
from steer2edit.data.metric_choice import MetricChoice, shared_metric
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import MAX_TOKENS, Encoded, Span, encode
from steer2edit.files.untrusted import local


@dataclass(frozen=True)
class Behavior:
    """What to compile: labelled examples, their name for cards and receipts, a system message, if any, and the span.

    ``metric`` is what the behaviour is measured by, where it says so. ``origin`` says in plain values, without any text of the
    data, where each part came from.

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
    origin: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        source: BehaviorFile | DataFolder,
        system: str | None = None,
        span: Span = "matched",
        chat_template_kwargs: TemplateArguments | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Behavior:
        """The behaviour of an opened file or folder. Raises DataError where it has no pairs."""
        pairs = source.read_pairs()
        return cls(source.name, pairs, system, span, chat_template_kwargs, max_tokens, source.metric, (source.origin,))

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
        return cls.of(open_behavior(name), system, span, chat_template_kwargs, max_tokens)

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
        """Contrast data from a file, a Hub dataset or a folder of data, ``limit`` rows of it at most.

        Raises DataError listing every problem.
        """
        folder = local(source)
        if folder is not None and folder.is_dir():
            behavior = cls.of(open_data_folder(folder), system, span, chat_template_kwargs, max_tokens)
            return behavior if limit is None else behavior.limited(limit)
        examples = contrast.read_contrast(source, limit)
        return cls(
            Path(source).stem, examples, system, span, chat_template_kwargs, max_tokens, origin=({"kind": "file"},)
        )

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
        metric = shared_metric(part.metric for part in parts)
        origin = tuple(one for part in parts for one in part.origin)
        return replace(parts[0], name=name, examples=examples, metric=metric, origin=origin)

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
