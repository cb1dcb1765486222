"""What each stage costs on an accelerator against a bare pass over the same tokens, with its peak memory.

    python benchmarks/gpu.py MODEL --device cuda --dtype bfloat16
    python benchmarks/gpu.py --random 7 --work DIR --device cuda --dtype bfloat16

The stages are capture, the KL on neutral text, the same under an edit and under activation steering, and written answers. A bare
pass runs the body over exactly the stage's batches and keeps nothing. The device is waited for at the end of each run. Without
an accelerator the same runs on the CPU, and memory is not shown. ``--random`` makes a random llama of so many 10⁹ parameters
in bfloat16; its answers say nothing and are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from capture_speed import forward
from synthetic import make_checkpoint, random_plan
from timing import arguments, interleaved, ratio, report

from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.capture.run import capture
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import behavior_files
from steer2edit.data.contrast import neutral_text
from steer2edit.data.questions import knowledge_questions
from steer2edit.data.templates import render_prompts
from steer2edit.data.tokens import Encoded
from steer2edit.engines.generation import generate
from steer2edit.engines.own_answers import OwnAnswer
from steer2edit.runtime.batches import pad_right
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import DTYPES, LoadedModel, Runtime, load_model
from steer2edit.strength.kl import NeutralText


def main() -> None:
    """Print a row a stage: tokens a second, speed against the bare pass, peak memory beyond the weights."""
    parser = arguments(__doc__, model=False, runs=5)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("--random", type=float, metavar="BILLIONS", help="a random llama of this size instead")
    parser.add_argument("--work", type=Path, default=Path("."), help="folder of the random model")
    parser.add_argument("--behavior", default="concise", choices=behavior_files())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--limit", type=int, help="use only so many examples and windows")
    parser.add_argument("--answers", type=int, default=32, help="answers written (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give MODEL or --random")
    torch.set_num_threads(options.threads)
    where = options.model or make_checkpoint(options.work, 2 * options.random)
    checkpoint = open_checkpoint(where)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(device=options.device, dtype=options.dtype))
    device = loaded.device
    accelerated = device.type == "cuda"
    weights = torch.cuda.memory_allocated(device) if accelerated else 0
    count = options.limit or 32
    if options.random is not None:
        examples = _random_examples(loaded, 2 * count)
        text = NeutralText(loaded, [OwnAnswer(e.ids[:128], 1, False) for e in examples[:count]])
    else:
        examples = Behavior.named(options.behavior).encode(loaded.tokenizer, loaded.context)[: options.limit]
        text = NeutralText(loaded, neutral_text(), max_tokens=128 * count)
    plan = random_plan(checkpoint, spec, [MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT], norm=1e-3)
    vectors = {site.key: torch.full((site.out_features,), 1e-6) for site in spec.sites}
    windows = [Encoded(tuple(row), 1, "background", number) for number, row in enumerate(text.rows)]
    batch_tokens = options.batch_tokens

    def under(hooks: Any) -> None:
        with hooks:
            text.measure()

    stages: dict[str, Callable[[], object]] = {
        "bare pass, examples": lambda: forward(loaded, examples, batch_tokens),
        "capture": lambda: capture(loaded, examples, batch_tokens=batch_tokens),
        "bare pass and unembedding, windows": lambda: _unembedded(loaded, text.rows),
        "KL": text.measure,
        "KL under the edit": lambda: under(edited(loaded, plan)),
        "KL under steering": lambda: under(steered(loaded, vectors, 1.0)),
    }
    peaks: dict[str, int] = {}
    seconds = interleaved({name: _watched(stages[name], name, device, peaks) for name in stages}, options.runs)
    tokens = {
        name: sum(len(e.ids) for e in (windows if "KL" in name or "windows" in name else examples)) for name in stages
    }
    bare = dict.fromkeys(("capture",), "bare pass, examples")
    bare |= dict.fromkeys(("KL", "KL under the edit", "KL under steering"), "bare pass and unembedding, windows")
    rows: list[list[object]] = [
        [
            name,
            tokens[name] / statistics.median(taken),
            ratio(seconds[bare[name]], taken) if name in bare else 1.0,
            (peaks[name] - weights) / 1e6 if accelerated else None,
        ]
        for name, taken in seconds.items()
    ]
    if options.random is None:
        rows.append(_answers_row(loaded, options.answers, options.max_new_tokens, device, peaks, weights))
    details = {
        "model": checkpoint.name,
        "device": torch.cuda.get_device_name(device) if accelerated else device.type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights_mb": weights / 1e6 if accelerated else None,
        "threads": options.threads,
        "seconds": seconds,
    }
    report(["stage", "tokens/s", "speed / bare", "peak MB beyond the weights"], rows, details, options.json)
    if not options.json:
        print(f"\n{details['model']} on {details['device']} in {details['dtype']}")


def _random_examples(loaded: LoadedModel, count: int, length: int = 256) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, loaded.vocabulary, (count, length), generator=generator).tolist()
    return [Encoded(tuple(row), 32, "negative" if i % 2 else "positive", i // 2) for i, row in enumerate(rows)]


def _unembedded(loaded: LoadedModel, rows: list[tuple[int, ...]]) -> None:
    """The body and the unembedding over the windows in the text's batches, and nothing else."""
    for first in range(0, len(rows), 16):
        ids, mask = pad_right(rows[first : first + 16], loaded.padding, loaded.device)
        with torch.inference_mode():
            states = loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            for part in torch.split(states.flatten(0, 1), 256):
                loaded.logits(part)


def _watched(stage: Callable[[], object], name: str, device: torch.device, peaks: dict[str, int]) -> Callable[[], None]:
    """The stage with the wait for the device at its end, and its peak of memory."""

    def run() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        stage()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peaks[name] = torch.cuda.max_memory_allocated(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    return run


def _answers_row(
    loaded: LoadedModel, count: int, most: int, device: torch.device, peaks: dict[str, int], weights: int
) -> list[object]:
    questions = knowledge_questions()[:count]
    prompts = render_prompts({q.prompt: q.where for q in questions}, loaded.tokenizer, writing=True)
    texts, name = [prompts[question.prompt] for question in questions], "written answers"
    special = not loaded.tokenizer.chat_template
    answers: list[list[int]] = []

    def write() -> None:
        answers[:] = generate(loaded, texts, max_new_tokens=most, add_special_tokens=special)

    seconds = interleaved({name: _watched(write, name, device, peaks)}, 1)[name][0]
    peak = (peaks[name] - weights) / 1e6 if device.type == "cuda" else None
    return [name, sum(map(len, answers)) / seconds, None, peak]


if __name__ == "__main__":
    main()
