"""What the verdict on contrast data is calibrated on: behaviours that work, and the same with swapped labels.

    python benchmarks/data_verdict.py models/SmolLM2-135M-Instruct --keep activations

Labels are swapped for a share of the pairs: at a share of one half nothing is left of the behaviour. Each row has the least, the
median and the largest number of several draws of pairs and swappings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from steer2edit.architecture import read_spec
from steer2edit.capture.per_example import stream_means
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.prompts import prompt_digest
from steer2edit.pairs.separation import Separation, separation
from steer2edit.progress import bar
from steer2edit.runtime.model import LoadedModel, load_model

BEHAVIORS = ("concise", "formal", "cautious", "plain", "warm", "truthful")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
NUMBERS = ("agreement", "d_prime", "chance")


def activations(loaded: LoadedModel, name: str) -> tuple[torch.Tensor, list[str]]:
    """Activations of a behaviour's pairs, ``[pairs, 2, layers, features]``, and the digests of their prompts."""
    behavior = Behavior.named(name)
    encoded = behavior.encode(loaded.tokenizer, loaded.context)
    digests = [prompt_digest(e.prompt) for e in behavior.examples if e.label == "positive"]
    means = stream_means(loaded, encoded, progress=bar)
    labels = [e.label for e in behavior.examples]
    sides = [means[[i for i, label in enumerate(labels) if label == side]] for side in ("positive", "negative")]
    return torch.stack(sides, dim=1), digests


def measured(pairs: torch.Tensor, digests: list[str], count: int, share: float, seed: int) -> Separation | None:
    """The numbers of ``count`` of the pairs with the labels of a share of them swapped."""
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(digests), generator=draws)[:count]
    own = pairs[chosen].clone()
    swapped = torch.randperm(len(chosen), generator=draws)[: round(share * len(chosen))]
    own[swapped] = own[swapped].flip(1)
    return separation(own, [digests[i] for i in chosen.tolist()], seed)


def main(argv: list[str]) -> Iterator[dict[str, object]]:
    """One row for each behaviour, number of pairs and share of swapped labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--behavior", nargs="*", default=list(BEHAVIORS))
    parser.add_argument("--pairs", type=int, nargs="*", default=[20, 48], help="numbers of pairs that are drawn")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for activations, which are computed once")
    wanted = parser.parse_args(argv)
    torch.set_num_threads(wanted.threads)
    checkpoint = open_checkpoint(wanted.model)
    spec = read_spec(checkpoint)
    loaded = None
    for name in wanted.behavior:
        kept = wanted.keep and wanted.keep / f"{checkpoint.fingerprint[:12]}-{name}.pt"
        if kept and kept.is_file():
            pairs, digests = torch.load(kept, weights_only=True)
        else:
            loaded = loaded or load_model(checkpoint, spec)
            pairs, digests = activations(loaded, name)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save((pairs, digests), kept)
        first, last = spec.deeper_half
        for count in wanted.pairs:
            for share in SHARES:
                found = [
                    one
                    for seed in range(wanted.draws)
                    if (one := measured(pairs[:, :, first : last + 1], digests, count, share, seed))
                ]
                numbers = {
                    key: [
                        round(float(torch.tensor([getattr(one, key) for one in found]).quantile(q)), 3)
                        for q in (0, 0.5, 1)
                    ]
                    for key in NUMBERS
                }
                yield {"behavior": name, "pairs": count, "swapped": share, **numbers}


if __name__ == "__main__":
    for row in main(sys.argv[1:]):
        print(json.dumps(row), flush=True)
