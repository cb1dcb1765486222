"""MoTE's count (arXiv 2502.11096): answers that change when the experts most typical of a behaviour are switched off."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from greedy import Generate, through_transformers
from paper_journal import Journal
from tabulate import tabulate

from steer2edit.bootstrap import estimate
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import Checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.questions import Question, knowledge_questions, take
from steer2edit.data.templates import render_prompts
from steer2edit.errors import PlanError
from steer2edit.experts.edits import Request, lower_experts
from steer2edit.experts.ranking import expert_table, ranking
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.meet import at
from steer2edit.strength.neutral_texts import neutral_texts

DRAWS = 3


def count_changed(checkpoint: Checkpoint, loaded: LoadedModel, options: argparse.Namespace, journal: Journal) -> None:
    """Switch off the ``--top`` experts most typical of the behaviour, then as many random ones, and count changed answers."""
    if not loaded.spec.routers:
        raise PlanError(f"{checkpoint.name} is not a mixture of experts: it has none to switch off")
    behavior = Behavior.named(options.behavior)
    statistics = journal.statistics(lambda keep: capture_statistics(loaded, checkpoint, behavior, keep=keep))
    own = [(one.layer, one.expert) for one in ranking(expert_table(statistics), options.top, "positive")]
    free = [(r.layer, e) for r in loaded.spec.routers for e in range(r.experts) if (r.layer, e) not in own]
    if len(free) < options.top:
        raise PlanError(f"--top {options.top} leaves {len(free)} experts to draw at random: lower it")
    rng = random.Random(f"{options.behavior} {options.top}")
    masks = {f"{options.behavior}'s {options.top}": own}
    masks |= {f"random {options.top}, draw {i + 1}": rng.sample(free, options.top) for i in range(DRAWS)}

    asked = {
        options.behavior: take(builtin_questions(options.behavior) or [], "report")[: options.limit],
        "knowledge": take(knowledge_questions(), "report")[: options.limit],
    }
    costs = neutral_texts(loaded, limit=options.kl_rows)
    write = journal.writing(through_transformers)
    before = {name: answers(loaded, questions, options.max_new_tokens, write) for name, questions in asked.items()}
    for name, experts in masks.items():
        if name in journal.rows:
            continue
        apply = partial(edited, loaded, lower_experts(checkpoint, loaded.spec, Request.of(sorted(experts)), how="zero"))
        with apply(1.0):
            after = {kind: answers(loaded, questions, options.max_new_tokens) for kind, questions in asked.items()}
        changed = {kind: [float(a != b) for a, b in zip(before[kind], after[kind], strict=True)] for kind in asked}
        kl = at(apply, costs.budget).divergence.kl
        journal.add(name, {"off": name, "experts": sorted(experts), "changed": changed, "kl": kl})
        print(f"{name}: KL {kl:.3g}", file=sys.stderr, flush=True)
    print(table([journal.rows[name] for name in masks], list(asked)))


def table(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> str:
    """Shares of changed answers, and how far the behaviour's experts go beyond the mean of the random draws."""
    first, *draws = rows
    lines = [[row["off"], f"{row['kl']:.3g}", *(str(estimate(row["changed"][kind])) for kind in kinds)] for row in rows]
    beyond: list[str] = []
    for kind in kinds:
        means = [sum(values) / len(draws) for values in zip(*(row["changed"][kind] for row in draws), strict=True)]
        beyond.append(str(estimate([a - b for a, b in zip(first["changed"][kind], means, strict=True)])))
    lines.append(["beyond the random draws' mean", "", *beyond])
    heads = ["experts off", "KL", *(f"answers changed, {kind}" for kind in kinds)]
    return str(tabulate(lines, headers=heads, disable_numparse=True))


def answers(
    loaded: LoadedModel, questions: Sequence[Question], tokens: int, write: Generate = through_transformers
) -> list[list[int]]:
    """Greedy answers, as token ids."""
    texts = render_prompts({q.prompt: q.where for q in questions}, loaded.tokenizer, writing=True)
    return write(loaded, [texts[q.prompt] for q in questions], tokens)
