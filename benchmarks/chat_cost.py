"""What an edit costs in a chat and on prose, at one KL in chat.

    python benchmarks/chat_cost.py MODEL --behavior concise --kl-budget 0.2

The chat text is the base model's own: its greedy answers to the packaged everyday prompts, with the chat template. Every
candidate is brought to the budget there, or, with ``--prose``, on the packaged prose. Then its KL from the base is measured on
both texts, in nats per token. Intervals are bootstrap 95 % over answers, and over windows of 128 tokens.
"""

from __future__ import annotations

import argparse

from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import neutral_text
from steer2edit.evaluation.baselines import random_direction, steering_at, to_kl
from steer2edit.evaluation.candidates import Candidate, plan_candidate
from steer2edit.methods import make_plan
from steer2edit.plan.measured import KL_NAMES
from steer2edit.progress import bar
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts
from steer2edit.strength.settle import settle_strength


def candidates(loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts, budget: float) -> list[Candidate]:
    """The default edit, component edits, activation steering and a random direction, each at the budget on ``neutral``."""
    found = []
    for method in ("steering", "component"):
        plan = settle_strength(loaded, make_plan(scoring, method=method), kl_budget=budget, neutral=neutral)
        found.append(plan_candidate(loaded, f"method {method}", plan))
        if method == "steering":
            control = to_kl(loaded, random_direction(plan, seed=0), neutral, budget)
    return [*found, steering_at(loaded, scoring, neutral, budget), plan_candidate(loaded, "random direction", control)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", default="concise")
    parser.add_argument("--kl-budget", type=float, default=0.2)
    parser.add_argument("--prose", action="store_true", help="bring every candidate to the budget on prose")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    behavior = Behavior.named(options.behavior)
    scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, behavior))
    texts = neutral_texts(loaded, neutral_text() if options.prose else None, bar)
    rows = []
    for candidate in candidates(loaded, scoring, texts, options.kl_budget):
        with candidate.enter() as changed:
            rows.append([candidate.name, *(str(text.measure(changed).estimate) for text in texts)])
        print(*rows[-1], flush=True)
    heads = ["", *(f"{KL_NAMES[text.kind]} ({text.tokens} tokens)" for text in texts)]
    print(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
