"""What an edit costs in a chat when its KL was brought to a budget on neutral prose.

    python benchmarks/chat_cost.py MODEL --behavior concise --kl-budget 0.05

The chat text is the base model's own: its greedy answers to packaged questions of other behaviours, with the chat template.
Every candidate is brought to the budget on the packaged neutral prose. Then its KL from the base is measured on both texts, in
nats per token. Intervals are bootstrap 95 % over windows of 128 tokens.
"""

from __future__ import annotations

import argparse

from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import behaviors
from steer2edit.data.questions import builtin_questions
from steer2edit.data.templates import render_prompts, templated
from steer2edit.engines.generation import generate
from steer2edit.evaluation.baselines import random_direction, steering_at, to_kl
from steer2edit.evaluation.evaluate import Candidate, plan_candidate
from steer2edit.methods import make_plan
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.settle import neutral_text, settle_strength


def chats(loaded: LoadedModel, behavior: str, prompts: int, tokens: int) -> list[str]:
    """The base's answers to questions of other behaviours, each with its rendered prompt."""
    others = [name for name in behaviors() if name != behavior]
    asked = [
        [question.prompt for question in builtin_questions(name) or []][: prompts // len(others)] for name in others
    ]
    rendered = list(
        render_prompts({prompt: "a packaged question" for part in asked for prompt in part}, loaded.tokenizer).values()
    )
    special = not templated(loaded.tokenizer)
    answers = generate(loaded, rendered, max_new_tokens=tokens, add_special_tokens=special)
    return [prompt + loaded.tokenizer.decode(answer) for prompt, answer in zip(rendered, answers, strict=True)]


def candidates(loaded: LoadedModel, scoring: Scoring, neutral: NeutralText, budget: float) -> list[Candidate]:
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
    parser.add_argument("--kl-budget", type=float, default=0.05)
    parser.add_argument("--prompts", type=int, default=48, help="questions that the base answers (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=80, help="tokens of an answer, at most (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    behavior = Behavior.builtin(options.behavior)
    scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, behavior))
    prose = neutral_text(loaded)
    chat = NeutralText(loaded, chats(loaded, options.behavior, options.prompts, options.tokens), max_tokens=1 << 20)
    rows = []
    for candidate in candidates(loaded, scoring, prose, options.kl_budget):
        with candidate.enter() as changed:
            rows.append([candidate.name, str(prose.measure(changed).estimate), str(chat.measure(changed).estimate)])
        print(*rows[-1], flush=True)
    heads = ["", f"KL on prose ({prose.tokens} tokens)", f"KL in chat ({chat.tokens} tokens)"]
    print(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
