"""How much faster answers are written than by one call of transformers' generate for each batch.

Both ways write greedy answers to the packaged knowledge questions, in the same batches, in turns within one run. The ratio
is over processor time, so that what else the machine does counts less. ``--answers`` bounds the questions.

    python benchmarks/generation_speed.py MODEL --dtype bfloat16
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from timing import arguments, interleaved, ratio, report

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.questions import knowledge_questions
from steer2edit.data.templates import render_prompts
from steer2edit.data.tokens import token_ids
from steer2edit.engines.generation import generate
from steer2edit.runtime.batches import pad_left
from steer2edit.runtime.model import DTYPES, LoadedModel, Runtime, load_model


def main() -> None:
    """Print tokens a second of both, and the ratio."""
    parser = arguments(__doc__, runs=3)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default %(default)s)")
    parser.add_argument("--answers", type=int, default=64, help="questions to answer (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="most tokens an answer (default %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=given.dtype))
    questions = knowledge_questions()[: given.answers]
    prompts = render_prompts({q.prompt: q.where for q in questions}, loaded.tokenizer, writing=True)
    texts = [prompts[question.prompt] for question in questions]
    special = not loaded.tokenizer.chat_template
    most, answers = given.max_new_tokens, {}

    def ours() -> None:
        answers["ours"] = generate(loaded, texts, max_new_tokens=most, add_special_tokens=special)

    def theirs() -> None:
        answers["theirs"] = one_call(loaded, token_ids(loaded.tokenizer, texts, special), most)

    seconds = interleaved({"ours": ours, "theirs": theirs}, given.runs, clock=time.process_time)
    tokens = sum(map(len, answers["ours"]))
    rows = [
        [name, min(seconds[key]), tokens / min(seconds[key])]
        for key, name in (("theirs", "one call of transformers a batch"), ("ours", "steer2edit"))
    ]
    same = sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    details = {
        "ratio": ratio(seconds["theirs"], seconds["ours"]),
        "tokens": tokens,
        "same_answers": same,
        "answers": len(texts),
        "seconds": seconds,
    }
    report(["way", "processor seconds", "tokens/s"], rows, details, given.json)
    if not given.json:
        print(f"\nratio {details['ratio']:.2f}; {same} of {len(texts)} answers are the same token for token")


def one_call(loaded: LoadedModel, rows: Sequence[Sequence[int]], most: int, batch_size: int = 256) -> list[list[int]]:
    """Greedy answers of each batch by one call of transformers' ``generate``, cut at the end tokens."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers: dict[int, list[int]] = {}
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            ids, mask = pad_left([rows[i] for i in chosen], loaded.padding, loaded.device)
            out = loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=loaded.padding,
            )[:, ids.shape[1] :].tolist()
            for index, row in zip(chosen, out, strict=True):
                answers[index] = row[: next((i for i, t in enumerate(row) if t in loaded.end_tokens), len(row))]
    return [answers[index] for index in range(len(rows))]


if __name__ == "__main__":
    main()
