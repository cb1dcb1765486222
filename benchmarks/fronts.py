"""Attribute–utility fronts of the demo's behaviours: edits against activation steering, ablation and random directions.

    python benchmarks/fronts.py --json fronts.json --plot fronts.png

Every method is measured at the same KL budgets on the embedded model's tasks. For each of five seeds the tasks are dealt into
two halves: on one the settings that are on the front are chosen, on the other the area under that front is measured: the
attribute's rate that can be had while keeping a utility of at least u, averaged over u from 0.8 to 1. Given are the mean over
seeds and the bootstrap 95 % interval over tasks, seeds pooled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.demo import invented_world
from steer2edit.demo.run import answers_to, demo_behavior, model_folder, neutral_documents
from steer2edit.evaluation.baselines import random_direction, steering_at, to_kl
from steer2edit.evaluation.candidates import Candidate, plan_candidate
from steer2edit.methods import make_plan, steering
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.search.pareto import front_of
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts

BUDGETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
SEEDS = range(5)
FLOOR, DRAWS = 0.8, 400
GOALS = ("more", "more")
Passed = tuple[torch.Tensor, torch.Tensor]


def candidates(loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts) -> dict[str, Callable[[float], Candidate]]:
    """By method, what it is at a KL."""
    edit = make_plan(scoring)
    plans = {
        "edit (steering)": edit,
        "edit (steering, columns apart)": make_plan(scoring, options=steering.Options(moments="diagonal")),
        "Steer2Edit's components": make_plan(scoring, method="component"),
        "ablation": make_plan(scoring, method="ablation"),
        **{f"random direction {seed + 1}": random_direction(edit, seed) for seed in range(3)},
    }
    found: dict[str, Callable[[float], Candidate]] = {
        name: lambda kl, plan=plan: plan_candidate(loaded, "", to_kl(loaded, plan, neutral, kl))  # type: ignore[misc]
        for name, plan in plans.items()
    }
    found["activation steering"] = lambda kl: steering_at(loaded, scoring, neutral, kl)
    return found


def passed(loaded: LoadedModel, tasks: Sequence[invented_world.Task]) -> Passed:
    """Which attribute and which utility tasks pass."""
    answers = answers_to(loaded, tasks)
    rows = [(task.kind, task.grade(answer)) for task, answer in zip(tasks, answers, strict=True)]
    attribute, utility = (
        torch.tensor([ok for kind, ok in rows if kind == name], dtype=torch.float64)
        for name in ("attribute", "utility")
    )
    return attribute, utility


def area(points: Sequence[tuple[float, float]], base: tuple[float, float]) -> float:
    """The mean over u in [FLOOR, 1] of the best attribute at a utility of at least u.

    Where no point keeps u, the base's attribute counts.
    """
    total = 0.0
    steps = 101
    for i in range(steps):
        u = FLOOR + (1 - FLOOR) * i / (steps - 1)
        total += max([a for a, kept in points if kept >= u], default=base[0])
    return total / steps


def areas(measured: Mapping[str, list[Passed]], base: Passed) -> dict[str, list[float]]:
    """By method, the area on the reporting half for every seed and every bootstrap draw of that half."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        halves = [torch.rand(len(part), generator=generator) < 0.5 for part in base]
        draws = []
        for half in halves:
            index = (~half).nonzero()[:, 0]
            plain = index[None]
            drawn = index[torch.randint(len(index), (DRAWS, len(index)), generator=generator)]
            draws.append(torch.cat((plain, drawn)))
        for name, settings in measured.items():
            # the base itself is always a choice
            choices = [base, *settings]
            chosen = {
                i: tuple(float(p[h].mean()) for p, h in zip(c, halves, strict=True)) for i, c in enumerate(choices)
            }
            front = front_of(chosen, GOALS)  # type: ignore[arg-type]
            values = [[p[d].mean(dim=1) for p, d in zip(choices[i], draws, strict=True)] for i in front]
            kept = [p[d].mean(dim=1) for p, d in zip(base, draws, strict=True)]
            for draw in range(DRAWS + 1):
                points = [(float(a[draw]), float(u[draw])) for a, u in values]
                found[name].append(area(points, (float(kept[0][draw]), float(kept[1][draw]))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behavior", action="append", choices=invented_world.BEHAVIORS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    checkpoint = open_checkpoint(model_folder())
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(device="cpu", dtype="float32"))
    curves: dict[str, Any] = {}
    for behavior in options.behavior or invented_world.BEHAVIORS:
        statistics = capture_statistics(
            loaded, checkpoint, demo_behavior(behavior), background=neutral_documents(seed=2)
        )
        scoring = Scoring(checkpoint, loaded.spec, statistics)
        neutral = neutral_texts(loaded, neutral_documents())
        tasks = invented_world.tasks(behavior)
        base = passed(loaded, tasks)
        measured: dict[str, list[Passed]] = {}
        for name, at in candidates(loaded, scoring, neutral).items():
            measured[name] = []
            for kl in BUDGETS:
                with at(kl).enter() as model:
                    measured[name].append(passed(replace(loaded, model=model.model), tasks))
        found = areas(measured, base)
        curves[behavior] = {
            name: [[float(a.mean()), float(u.mean())] for a, u in settings] for name, settings in measured.items()
        }
        rows = []
        for name, values in found.items():
            whole = torch.tensor(values, dtype=torch.float64).view(len(SEEDS), DRAWS + 1)
            low, high = torch.quantile(
                whole[:, 1:].flatten(), torch.tensor([0.025, 0.975], dtype=torch.float64)
            ).tolist()
            seeds = " ".join(f"{value:.2f}" for value in whole[:, 0].tolist())
            points = " ".join(f"{a:.2f}/{u:.2f}" for a, u in curves[behavior][name])
            rows.append([name, f"{float(whole[:, 0].mean()):.3f} [{low:.3f}, {high:.3f}]", seeds, points])
        rates = tuple(float(part.mean()) for part in base)
        print(
            f"\n{behavior}: base {rates[0]:.2f}/{rates[1]:.2f}; attribute/utility at KL {', '.join(map(str, BUDGETS))}"
        )
        print(tabulate(rows, headers=["", "area under the front", "seeds", ""]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"budgets": BUDGETS, "curves": curves}, indent=1))
    if options.plot:
        draw(curves, options.plot)


def draw(curves: Mapping[str, Any], path: Path) -> None:
    """Attribute against utility, a panel for each behaviour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (behavior, methods) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for name, points in methods.items():
            muted = name.startswith(("random", "ablation"))
            style = {"color": "#bbb", "linewidth": 1} if muted else {"linewidth": 1.8}
            label = None if name.startswith("random") and not name.endswith("1") else name
            axis.plot([u for _, u in points], [a for a, _ in points], marker="o", markersize=3, label=label, **style)
        labels = invented_world.LABELS[behavior]
        axis.set(title=behavior, xlabel=labels["utility"], ylabel=labels["attribute"])
        axis.set(xlim=(0.5, 1.02), ylim=(-0.02, 1.02))
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
