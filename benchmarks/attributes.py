"""What an edit does at a given KL: methods against activation steering, on held-out prompts.

    python benchmarks/attributes.py MODEL --behavior concise --kl-budget 0.05
    python benchmarks/attributes.py MODEL --behavior truthful --kl-budget 0.05 --method steering --method steering:sites=both

For `concise` the attribute is the mean generated length in tokens; for `truthful` the mean margin of log-probability per token
of true over false answers, and how often it is positive. Intervals are bootstrap 95 % over prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from steer2edit import contrast, methods
from steer2edit.analysis import Scoring
from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.compiler import Behavior, capture_statistics, make_plan
from steer2edit.contrast import Example, Message
from steer2edit.divergence import NeutralText, find_strength
from steer2edit.encoding import encode, render_prompt
from steer2edit.evaluate import generate, mean_and_interval
from steer2edit.model import LoadedModel, Runtime, batches, edited, load_model, pad_right, steered

PROMPTS = Path(__file__).parent / "prompts"
METHODS = ["steering", "steering:sites=both", "steering:sites=mlp", "component", "component:scale=absolute"]
Around = Callable[[float], AbstractContextManager[None]]


def rows(name: str, limit: int | None) -> list[dict[str, str]]:
    lines = (PROMPTS / f"{name}_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][:limit]


def lengths(loaded: LoadedModel, limit: int | None, max_new_tokens: int) -> dict[str, list[float]]:
    chat = [(Message("user", row["prompt"]),) for row in rows("concise", limit)]
    texts = [render_prompt(prompt, loaded.tokenizer) for prompt in chat]
    special = not loaded.tokenizer.chat_template
    answers = generate(loaded, texts, max_new_tokens=max_new_tokens, add_special_tokens=special)
    return {"tokens generated": [float(len(answer)) for answer in answers]}


def margins(loaded: LoadedModel, limit: int | None) -> dict[str, list[float]]:
    pairs = rows("truthful", limit)
    examples = [
        Example((Message("user", row["prompt"]),), row[label], label, "", index)
        for index, row in enumerate(pairs)
        for label in contrast.LABELS
    ]
    encoded = encode(examples, loaded.tokenizer, span="response")
    scores: dict[tuple[int, str], float] = {}
    with torch.inference_mode():
        for chosen in batches([len(one.ids) for one in encoded], 2048):
            ids, mask = pad_right([encoded[i].ids for i in chosen], 0, loaded.device)
            logits = loaded.model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
            found = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            for line, index in zip(found, chosen, strict=True):
                one = encoded[index]
                scores[one.row, one.label] = float(line[one.start - 1 : len(one.ids) - 1].mean())
    values = [scores[row, "positive"] - scores[row, "negative"] for row in range(len(pairs))]
    return {"margin (nats/token)": values, "true preferred": [float(value > 0) for value in values]}


def options_of(text: str) -> tuple[str, Any]:
    name, _, settings = text.partition(":")
    given: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        try:
            given[key] = float(value)
        except ValueError:
            given[key] = value
    return name, methods.load(name).Options(**given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", choices=("concise", "truthful"), default="concise")
    parser.add_argument("--kl-budget", type=float, action="append", default=None)
    parser.add_argument("--method", action="append", default=None, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--span", choices=("matched", "response"), default="matched")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--no-steering", action="store_true", help="leave activation steering out")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    behavior = Behavior.builtin(options.behavior)
    behavior = Behavior(behavior.name, behavior.examples, span=options.span)
    statistics = capture_statistics(loaded, checkpoint, behavior)
    neutral = NeutralText(loaded, contrast.neutral_text())
    vectors = {site.key: statistics.difference(site.key).float() for site in loaded.spec.sites}
    candidates: dict[str, Around] = {}
    for text in options.method or METHODS:
        name, chosen = options_of(text)
        plan = make_plan(Scoring(checkpoint, loaded.spec, statistics), method=name, options=chosen)
        candidates[text] = lambda strength, plan=plan: edited(loaded, plan, strength)  # type: ignore[misc]
    if not options.no_steering:
        candidates["activation steering"] = lambda strength: steered(loaded, vectors, strength)

    def attribute() -> list[str]:
        found = (
            lengths(loaded, options.limit, options.max_new_tokens)
            if options.behavior == "concise"
            else margins(loaded, options.limit)
        )
        cells = (mean_and_interval(values) for values in found.values())
        return [f"{mean:.3g} [{low:.3g}, {high:.3g}]" for mean, low, high in cells]

    base = neutral.measure()
    table = [["base", "", "0", f"{base.perplexity:.2f}", *attribute()]]
    for budget in options.kl_budget or [0.05]:
        for name, around in candidates.items():

            def measure(strength: float, around: Around = around) -> Any:
                with around(strength):
                    return neutral.measure()

            found = find_strength(measure, budget)
            with around(found.strength):
                cells = attribute()
            divergence = found.divergence
            table.append(
                [name, f"{found.strength:.3g}", f"{divergence.kl:.4f}", f"{divergence.perplexity:.2f}", *cells]
            )
            print(*table[-1], sep="  ", flush=True)
    attributes = ["tokens generated"] if options.behavior == "concise" else ["margin (nats/token)", "true preferred"]
    print(tabulate(table, headers=["", "strength", "KL", "perplexity", *attributes], disable_numparse=True))


if __name__ == "__main__":
    main()
