"""What masks of experts equal, family by family, on tiny random models: largest logit differences to the references.

Two of eight experts are masked in every layer. ``off`` is the strongest way without cutting; its number is the difference to the
model whose routers cannot see them, or, for a fitted row, the largest share of tokens that still choose one. ``profile`` is how
far the experts' captured shares, put through their matrices, are from the layer's mean output, relative to its largest entry.
``neurons`` is the difference of a checkpoint with a rank-1 edit of every expert from the model under hooks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from steer2edit.artefact.emit import emit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import ROWS
from mask_laws import artefact, largest, logits, mask_plan, reference, selected, silenced
from mixture_models import MIXTURE_TYPES, MODELS, Case

from steer2edit.capture.populations import routing_key
from steer2edit.capture.run import capture_statistics
from steer2edit.data import contrast
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.experts.edits import strongest
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="model types (default: every mixture of the tests)"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| family | profile | off by | off | prune | zero | row | neurons |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.families or MIXTURE_TYPES:
            folder = Path(scratch) / name
            case = Case(MODELS[name](folder / "base"))
            print(f"| {name} | {' | '.join(row(case, folder))} |", flush=True)


def row(case: Case, folder: Path) -> list[str]:
    base = case.loaded()
    way = strongest(case.spec.routers[0])
    cells = [f"{profile(case):.0e}", way]
    off = mask_plan(case, way)
    masked = artefact(case, off, folder / "off")
    if way == "row":
        cells.append("see row")
    else:
        absent = off.method["experts"][0]["reference"] == "absent"
        cells.append(f"{largest(logits(masked), reference(case, base, absent=absent)):.0e}")
    cut = artefact(case, mask_plan(case, "prune"), folder / "prune")
    cells.append(f"{largest(logits(cut), reference(case, base, absent=True)):.0e}")
    silent = artefact(case, mask_plan(case, "zero"), folder / "zero")
    cells.append(f"{largest(logits(silent), silenced(case, base)):.0e}")
    rows = masked if way == "row" else artefact(case, mask_plan(case, "row", bound=1.0), folder / "row")
    cells.append(f"{selected(case, rows):.1%}")
    cells.append(f"{neurons(case, folder / 'neurons'):.0e}")
    return cells


def profile(case: Case) -> float:
    examples = [
        contrast.Example(one["prompt"], one[label], label, "", index)
        for index, one in enumerate(ROWS)
        for label in LABELS
    ]
    # the reference kernels of some recurrent mixers take gigabytes for a large batch
    statistics = capture_statistics(case.loaded(), case.checkpoint, Behavior("rows", examples), batch_tokens=512)
    worst = 0.0
    for router in case.spec.routers:
        for label in LABELS:
            total = torch.zeros(case.spec.hidden_size, dtype=torch.float64)
            mass = statistics.mean(routing_key("mass", "response", router.layer), "output", label)
            for site in (one for one in case.spec.sites if one.expert is not None and one.layer == router.layer):
                total += case.matrix(site).double() @ statistics.experts[router.layer, label].weighted[site.expert]
                if site.bias_vector:
                    bias = case.checkpoint.read(site.locate(case.checkpoint, site.bias_vector)).double()
                    total += bias * mass[site.expert]
            written = statistics.mean(f"experts_out.{router.layer}", "output", label)
            worst = max(worst, float((total - written).abs().max() / written.abs().max()))
    return worst


def neurons(case: Case, folder: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    edits = tuple(
        LowRank(
            site.matrix,
            torch.randn(site.out_features, 1, generator=generator) / site.out_features**0.5,
            0.3 * torch.randn(1, site.in_features, generator=generator) / site.in_features**0.5,
        )
        for site in case.spec.sites
        if site.expert is not None
    )
    plan = EditPlan(Base(case.checkpoint.name, None, case.checkpoint.fingerprint), edits)
    emit(plan, case.checkpoint, case.spec, "checkpoint", folder)
    base = case.loaded()
    with edited(base, plan):
        hooked = logits(base)
    return largest(hooked, logits(replace(base, model=load_weights(folder))))


if __name__ == "__main__":
    main()
