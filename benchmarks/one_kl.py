"""What the benchmarks at one KL share: flags, the model with its journal of cells, and paired differences."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from power import say
from power_cells import Bench, Cell, Journal, Settings, general_questions

from steer2edit.architecture import read_spec
from steer2edit.bootstrap import Estimate, estimate
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data.questions import Question
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts


@dataclass(frozen=True)
class OneKl:
    """The model, and what every method is measured on. ``costs`` are the texts of the KL, ``general`` the general questions."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    settings: Settings
    journal: Journal
    costs: NeutralTexts
    general: list[Question]

    def measure(self, bench: Bench, methods: Iterable[str]) -> None:
        """Bring each method to the KL, and keep its cells as they come."""
        for method in methods:
            for cell in bench.cells(method, self.journal):
                self.journal.add(cell)
                say(cell, self.costs.budget.kind)


def add_flags(parser: argparse.ArgumentParser, *, questions: int, knowledge: int, tokens: int, kl_rows: int) -> None:
    """The model and the shared flags, with a benchmark's own defaults."""
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--kl", type=float, default=0.1, help="nats per token (default %(default)s)")
    counts = {
        "--questions": (questions, "for the attribute"),
        "--knowledge": (knowledge, "general questions answered"),
        "--tokens": (tokens, "of an answer"),
        "--kl-rows": (kl_rows, "answers behind a KL"),
    }
    for flag, (default, what) in counts.items():
        parser.add_argument(flag, type=int, default=default, help=f"{what} (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads")


def opened(given: argparse.Namespace, *, written: int, answer_tokens: int) -> OneKl:
    """What the flags name. ``written`` answers of the behaviour are written; general ones have ``answer_tokens`` at most."""
    if given.threads:
        torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=given.dtype))
    settings = Settings(
        checkpoint.fingerprint, given.dtype, (given.kl,), (0,), given.questions, written, given.knowledge, answer_tokens,
        given.tokens, given.kl_rows, 0.0,
    )  # fmt: skip
    journal = Journal(given.out, settings)
    costs = neutral_texts(loaded, limit=given.kl_rows)
    return OneKl(checkpoint, loaded, settings, journal, costs, general_questions(given.knowledge))


def difference(cell: Cell, other: Cell, metric: str) -> Estimate:
    """The paired difference of a metric, with its bootstrap interval."""
    return estimate([a - b for a, b in zip(cell.values[metric], other.values[metric], strict=True)])


def in_words(change: Estimate) -> str:
    """A difference with its interval, as a table has it."""
    return f"{change.value:+.3g} [{change.low:+.3g}, {change.high:+.3g}]"
