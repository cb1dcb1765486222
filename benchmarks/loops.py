"""How many long answers go round in a loop under the default edit and under activation steering, at several KLs.

    python benchmarks/loops.py MODEL --behavior cautious --behavior plain --kl 0.025 --kl 0.05 --kl 0.1

Each is brought to every --kl on the model's own answers, and then answers --questions of the selection half, greedily and in at
most --tokens tokens. Beside the share of loops stand the share of repeated 4-grams and the margin, on up to --pairs of that half.
A line of JSON for each is written to --out, where one is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files, builtin_questions
from steer2edit.data.degeneration import loops, repetition
from steer2edit.data.questions import Question, take
from steer2edit.engines.engine import Request, Sampling, written
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.evaluation.metrics import Preference
from steer2edit.methods import METHOD, make_plan
from steer2edit.progress import silent
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.meet import Apply, meet
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", action="append", choices=behavior_files(), required=True, help="repeatable")
    parser.add_argument("--kl", action="append", type=float, help="repeatable; default: 0.025 0.05 0.1")
    parser.add_argument("--questions", type=int, default=32, help="answered (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer, at most (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=64, help="for the margin, at most (default %(default)s)")
    parser.add_argument("--kl-rows", type=int, default=24, help="answers behind a KL (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=given.dtype))
    costs = neutral_texts(loaded, limit=given.kl_rows)
    kls = given.kl or [0.025, 0.05, 0.1]
    print("| behaviour | method | KL | loops | repetition | margin |\n|---|---|---|---|---|---|")
    for name in given.behavior:
        ordered = sorted(builtin_questions(name) or [], key=lambda q: q.digest[::-1])
        asked = take(ordered, "select")
        scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, Behavior.named(name)))
        for method, kl, apply in [("base", 0.0, None), *candidates(loaded, scoring, costs, kls)]:
            with nullcontext() if apply is None else apply:
                found = measured(loaded, asked, given)
            row = {"behavior": name, "method": method, "kl": kl, **found}
            if given.out:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            print(f"| {name} | {method} | {kl or ''} | {' | '.join(f'{_mean(one):.3g}' for one in found.values())} |")


def candidates(loaded: LoadedModel, scoring: Scoring, costs: NeutralTexts, kls: Sequence[float]) -> list[Any]:
    """The default edit and activation steering at each KL: a name, the KL, and what applies it."""
    statistics = scoring.statistics
    vectors = {site.key: statistics.difference(site.vector_key).float() for site in scoring.spec.sites}
    methods: Mapping[str, Apply] = {
        "edit": partial(edited, loaded, make_plan(scoring, method=METHOD)),
        "activation steering": partial(steered, loaded, vectors),
    }
    return [
        (name, kl, apply(meet(apply, costs.budget, kl, name).strength)) for name, apply in methods.items() for kl in kls
    ]


def measured(loaded: LoadedModel, asked: Sequence[Question], given: argparse.Namespace) -> dict[str, list[float]]:
    """Loops and repetition of each answer, and the margin of each pair, of the model as it is now."""
    requests = [Request(question.prompt) for question in asked[: given.questions]]
    answers = written(TransformersEngine(loaded), requests, Sampling(given.tokens))
    pairs = [question for question in asked if question.positive][: given.pairs]
    return {
        "loops": [float(loops(answer.ids or (), answer.ended)) for answer in answers],
        "repetition": [repetition(answer.ids or ()) for answer in answers],
        "margin": Preference(pairs)._margins(loaded, [q.prompt for q in pairs], silent) if pairs else [],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main()
