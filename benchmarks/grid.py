"""The paper's grid from one capture: time to make its 125 plans, and of an evaluated candidate against a bare forward pass.

    python benchmarks/grid.py MODEL

The bare pass runs the same batches of neutral text, and of held-out pairs, through the unedited model with its logits; the
candidate runs them with the plan's hooks and also computes what is measured (KL against the base, margins).
"""

from __future__ import annotations

import time
from statistics import median

import torch
from timing import arguments, interleaved, ratio, report

from steer2edit.analysis import Scoring
from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.compiler import Behavior, capture_statistics, make_plan, neutral_text, settle_strength
from steer2edit.contrast import load_behavior
from steer2edit.encoding import encode
from steer2edit.evaluation.likelihood import response_log_probabilities
from steer2edit.hooks import edited
from steer2edit.methods import component
from steer2edit.model import Runtime, batches, load_model, pad_right
from steer2edit.search.tune import PAPER_GRID, Search


def main() -> None:
    parser = arguments(__doc__, runs=5)
    parser.add_argument("--behavior", default="truthful")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(dtype=options.dtype))
    statistics = capture_statistics(loaded, checkpoint, Behavior.builtin(options.behavior))

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

    neutral = neutral_text(loaded)
    pairs = encode(load_behavior(options.behavior), loaded.tokenizer, span="response")
    plan = settle_strength(loaded, make_plan(scoring), kl_budget=0.05, neutral=neutral)

    def bare(rows: list[tuple[int, ...]], batch_tokens: int) -> None:
        with torch.inference_mode():
            for chosen in batches([len(row) for row in rows], batch_tokens):
                ids, mask = pad_right([rows[i] for i in chosen], 0, loaded.device)
                loaded.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def kl() -> None:
        with edited(loaded, plan):
            neutral.measure()

    def margins() -> None:
        with edited(loaded, plan):
            response_log_probabilities(loaded, pairs)

    variants = {
        "KL on neutral text": kl,
        "bare pass, text": lambda: bare(neutral.rows, 2048),
        "margins of pairs": margins,
        "bare pass, pairs": lambda: bare([example.ids for example in pairs], 4096),
    }
    seconds = interleaved(variants, options.runs)
    names = list(variants)
    rows = [
        [mine, median(seconds[mine]), median(seconds[theirs]), ratio(seconds[mine], seconds[theirs])]
        for mine, theirs in zip(names[::2], names[1::2], strict=True)
    ]
    report(["candidate", "s", "bare pass, s", "ratio"], rows, {"plans": planned, "scores": scored}, options.json)


if __name__ == "__main__":
    main()
