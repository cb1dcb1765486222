"""What the verdict on contrast data is calibrated on: behaviours that work, and the same with swapped labels.

    python benchmarks/data_verdict.py models/SmolLM2-135M-Instruct --keep activations
    python benchmarks/data_verdict.py models/SmolLM2-135M-Instruct --keep activations --random --pairs 18 48
    python benchmarks/data_verdict.py models/SmolLM2-135M-Instruct --keep activations --classes
    python benchmarks/data_verdict.py models/SmolLM2-135M-Instruct --data FOLDER

Labels are swapped for a share of the pairs: at a share of one half nothing is left of the behaviour, and every verdict but "not"
is a false one. Each row has the least, the median and the largest number of several draws of pairs and swappings, and how many
draws got each verdict. --random draws the model's matrices anew, --classes sets positive answers beside the negative answers to
other prompts. Folders of data take the place of behaviours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from steer2edit.architecture import read_spec
from steer2edit.capture.per_example import stream_means
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.prompts import prompt_digest
from steer2edit.pairs.separation import Separation, separation
from steer2edit.pairs.verdict import verdict
from steer2edit.progress import bar
from steer2edit.runtime.model import LoadedModel, load_model

BEHAVIORS = ("concise", "formal", "cautious", "plain", "warm", "truthful")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
NUMBERS = ("agreement", "d_prime", "chance", "consistency", "p", "reliability")


def activations(loaded: LoadedModel, name: str) -> tuple[torch.Tensor, list[str]]:
    """Activations of a behaviour's pairs, ``[pairs, 2, layers, features]``, and the digests of their prompts."""
    behavior = Behavior.from_data(name) if Path(name).is_dir() else Behavior.named(name)
    encoded = behavior.encode(loaded.tokenizer, loaded.context)
    digests = [prompt_digest(e.prompt) for e in behavior.examples if e.label == "positive"]
    means = stream_means(loaded, encoded, progress=bar)
    labels = [e.label for e in behavior.examples]
    sides = [means[[i for i, label in enumerate(labels) if label == side]] for side in ("positive", "negative")]
    return torch.stack(sides, dim=1), digests


def measured(
    pairs: torch.Tensor, digests: list[str], count: int, share: float, seed: int, classes: bool = False
) -> Separation | None:
    """The numbers of ``count`` of the pairs with the labels of a share of them swapped."""
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(digests), generator=draws)[:count]
    own = pairs[chosen].clone()
    if classes:
        own[:, 1] = own[:, 1].roll(1, 0)
    swapped = torch.randperm(len(chosen), generator=draws)[: round(share * len(chosen))]
    own[swapped] = own[swapped].flip(1)
    return separation(own, [digests[i] for i in chosen.tolist()], seed, not classes)


def randomised(loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    """The model with matrices of random numbers of the same size: it has learned nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, float(parameter.float().std()))
    return loaded


def main(argv: list[str]) -> Iterator[dict[str, object]]:
    """One row for each behaviour, number of pairs and share of swapped labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--behavior", nargs="*", default=list(BEHAVIORS))
    parser.add_argument("--data", nargs="*", help="folders of made data, in place of behaviours")
    parser.add_argument("--random", action="store_true", help="draw the model's matrices anew")
    parser.add_argument("--classes", action="store_true", help="compare answers to different prompts")
    parser.add_argument("--share", type=float, nargs="*", default=list(SHARES), help="shares of labels to swap")
    parser.add_argument("--pairs", type=int, nargs="*", default=[20, 48], help="numbers of pairs that are drawn")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for activations, which are computed once")
    wanted = parser.parse_args(argv)
    torch.set_num_threads(wanted.threads)
    checkpoint = open_checkpoint(wanted.model)
    spec = read_spec(checkpoint)
    loaded = None
    for name in wanted.data or wanted.behavior:
        drawn = "-random" if wanted.random else ""
        kept = wanted.keep and wanted.keep / f"{checkpoint.fingerprint[:12]}{drawn}-{Path(name).name}.pt"
        if kept and kept.is_file():
            pairs, digests = torch.load(kept, weights_only=True)
        else:
            if loaded is None:
                loaded = load_model(checkpoint, spec)
                loaded = randomised(loaded) if wanted.random else loaded
            pairs, digests = activations(loaded, name)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save((pairs, digests), kept)
        first, last = spec.deeper_half
        for count in wanted.pairs:
            for share in wanted.share:
                own = pairs[:, :, first : last + 1]
                found = [
                    one
                    for seed in range(wanted.draws)
                    if (one := measured(own, digests, count, share, seed, wanted.classes))
                ]
                values = {
                    key: [one.reliability(one.pairs) if key == "reliability" else getattr(one, key) for one in found]
                    for key in NUMBERS
                }
                numbers = {
                    key: [round(float(torch.tensor(each).quantile(q)), 4) for q in (0, 0.5, 1)]
                    for key, each in values.items()
                }
                words = Counter(verdict(one, (), (one.pairs, one.pairs), one.pairs).word for one in found)
                yield {"behavior": name, "pairs": count, "swapped": share, **numbers, "verdicts": dict(words)}


if __name__ == "__main__":
    for row in main(sys.argv[1:]):
        print(json.dumps(row), flush=True)
