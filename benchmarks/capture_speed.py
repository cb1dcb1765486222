"""Tokens per second of capture, against the bare forward pass of the body, and against one example at a time.

    python benchmarks/capture_speed.py MODEL --behavior concise

``forward`` runs the body over exactly capture's batches and keeps nothing. ``one by one`` is capture with every example a
batch of its own, which needs no padding. Tokens are those of the examples, without padding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from timing import arguments, interleaved, ratio, report

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior_file import behavior_files, open_behavior
from steer2edit.data.tokens import Encoded, encode
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import DTYPES, LoadedModel, Runtime, load_model


def forward(loaded: LoadedModel, examples: Sequence[Encoded], batch_tokens: int) -> None:
    """The body over capture's batches, and nothing else."""
    body, pad = loaded.body(), loaded.tokenizer.pad_token_id or 0
    for indices in batches([len(example.ids) for example in examples], batch_tokens):
        ids, mask = pad_right([examples[i].ids for i in indices], pad, loaded.device)
        with torch.inference_mode():
            body(input_ids=ids, attention_mask=mask, use_cache=False)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--behavior", default="concise", choices=behavior_files())
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--limit", type=int, help="use only so many examples")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=given.dtype))
    examples = encode(open_behavior(given.behavior).read_pairs(), loaded.tokenizer)[: given.limit]
    variants: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(loaded, examples, given.batch_tokens),
        "capture": lambda: capture(loaded, examples, batch_tokens=given.batch_tokens),
        "one by one": lambda: capture(loaded, examples, batch_tokens=1),
    }
    seconds = interleaved(variants, given.runs)
    tokens = sum(len(example.ids) for example in examples)
    rows = [
        [name, tokens / statistics.median(taken), ratio(seconds["forward"], taken)] for name, taken in seconds.items()
    ]
    details = {
        "model": checkpoint.name,
        "behavior": given.behavior,
        "examples": len(examples),
        "tokens": tokens,
        "threads": given.threads,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seconds": seconds,
    }
    report(["what", "tokens/s", "speed / forward"], rows, details, given.json)


if __name__ == "__main__":
    main()
