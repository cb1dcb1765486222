"""Time of the paper's 125 plans from one capture, and of a candidate against a forward pass.

    python benchmarks/grid.py MODEL

The base's own answers are generated anew. The bare pass runs the same batches of neutral texts, held-out pairs and choices
through the unedited model with its logits; the candidate runs them with the plan's hooks and also computes what is measured (KL
against the base, log-probabilities). Seconds are of the processor: with one thread, what an idle machine would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from timing import arguments, interleaved, ratio, report

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import open_behavior
from steer2edit.data.contrast import Example, neutral_text
from steer2edit.data.questions import knowledge_questions
from steer2edit.data.templates import templated
from steer2edit.data.tokens import Encoded, encode
from steer2edit.engines.own_answers import own_answers
from steer2edit.evaluation.likelihood import response_log_probabilities
from steer2edit.methods import component, make_plan
from steer2edit.plan.measured import KL_NAMES
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.search.grid import PAPER_GRID
from steer2edit.search.tune import Search
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts, packaged_prompts
from steer2edit.strength.settle import settle_strength


def main() -> None:
    parser = arguments(__doc__, runs=5)
    parser.add_argument("--behavior", default="truthful")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--choices", type=int, default=80, help="questions, and pairs (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(dtype=options.dtype))
    statistics = capture_statistics(loaded, checkpoint, Behavior.named(options.behavior))

    started = time.perf_counter()
    scoring = Scoring(checkpoint, spec, statistics)
    scoring.score(spec.sites)
    scored = time.perf_counter() - started
    plans = []
    for point in Search(grid=PAPER_GRID).points():
        chosen = component.Options(**point, scale="absolute", stable=False)
        plans.append(make_plan(scoring, method="component", options=chosen))
    planned = time.perf_counter() - started
    edited_sites = [len(plan.edits) for plan in plans]
    print(
        f"scores {scored:.2f} s, then {len(plans)} plans: {planned:.2f} s in all ({min(edited_sites)}-{max(edited_sites)} sites)"
    )

    began = time.process_time()
    answers = own_answers(loaded, packaged_prompts(), fingerprint=None) if templated(loaded.tokenizer) else []
    generated = time.process_time() - began
    began = time.process_time()
    prose = NeutralText(loaded, neutral_text())
    neutral = NeutralTexts(NeutralText(loaded, answers), prose) if answers else NeutralTexts(prose)
    print(f"{len(answers)} own answers {generated:.1f} s, the base on both texts {time.process_time() - began:.1f} s")
    pairs = encode(
        open_behavior(options.behavior).read_pairs()[: 2 * options.choices], loaded.tokenizer, span="response"
    )
    asked = [q for q in knowledge_questions() if q.choices][: options.choices]
    rows_of = [Example(q.prompt, text, "positive", q.where, i) for i, q in enumerate(asked) for text in q.choices]
    choices = encode(rows_of, loaded.tokenizer, span="response")
    plan = settle_strength(loaded, make_plan(scoring), kl_budget=0.05, neutral=neutral)

    def bare(rows: list[tuple[int, ...]], batch_tokens: int) -> None:
        with torch.inference_mode():
            for chosen in batches([len(row) for row in rows], batch_tokens):
                ids, mask = pad_right([rows[i] for i in chosen], 0, loaded.device)
                loaded.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def kl(text: NeutralText) -> None:
        with edited(loaded, plan):
            text.measure()

    def likelihoods(examples: list[Encoded], share: bool) -> None:
        with edited(loaded, plan):
            response_log_probabilities(loaded, examples, share=share)

    variants: dict[str, Callable[[], None]] = {}
    for text in neutral:
        variants[f"bare pass, {text.kind}"] = partial(bare, text.rows, 2048)
        variants[KL_NAMES[text.kind]] = partial(kl, text)
    variants |= {
        "bare pass, pairs": lambda: bare([example.ids for example in pairs], 4096),
        "pairs, one by one": lambda: likelihoods(pairs, share=False),
        "pairs, prompts shared": lambda: likelihoods(pairs, share=True),
        "bare pass, choices": lambda: bare([example.ids for example in choices], 4096),
        "choices, one by one": lambda: likelihoods(choices, share=False),
        "choices, prompts shared": lambda: likelihoods(choices, share=True),
    }
    seconds = interleaved(variants, options.runs, clock=time.process_time)
    rows, theirs = [], ""
    for name in variants:
        theirs = name if name.startswith("bare") else theirs
        rows.append([name, median(seconds[name]), ratio(seconds[name], seconds[theirs])])
    details = {"plans": planned, "scores": scored, "seconds": seconds}
    report(["candidate", "s", "to the bare pass"], rows, details, options.json)


if __name__ == "__main__":
    main()
