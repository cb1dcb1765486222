"""What it costs to prove that a plan meets the matrices it was computed from.

    python benchmarks/plan_content.py MODEL

Measured in one run on a folder: reading and hashing every attention and MLP writer (which ``emit`` does first), emitting a plan
that edits them all into a checkpoint, and loading the model; the least of three times each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.runtime.model import load_weights


def seconds(work: Callable[[], object]) -> float:
    """The least time of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    checkpoint = open_checkpoint(parser.parse_args().model)
    spec = read_spec(checkpoint)
    edits = tuple(
        LowRank(site.matrix, torch.full((site.out_features, 1), 1e-3), torch.full((1, site.in_features), 1e-3))
        for site in spec.sites
    )
    plan = EditPlan(Base.of(checkpoint), edits)
    edited = sum(checkpoint.tensors[site.tensor].nbytes for site in spec.sites)
    whole = sum(info.nbytes for info in checkpoint.tensors.values())
    hashing = seconds(lambda: plan.computed_from(replace(checkpoint, digests={}), spec))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        emitting = seconds(lambda: emit(plan, checkpoint, spec, "checkpoint", out, force=True))
    loading = seconds(lambda: load_weights(checkpoint.path))
    print(f"edited matrices {edited / 1e6:.0f} MB of {whole / 1e6:.0f} MB")
    print(f"hashing them    {hashing:.3f} s, {edited / hashing / 1e9:.2f} GB/s")
    print(f"emitting        {emitting:.3f} s without it: it adds {hashing / emitting:.0%}")
    print(f"loading         {loading:.3f} s: it adds {hashing / loading:.0%}")


if __name__ == "__main__":
    main()
