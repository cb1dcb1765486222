"""``steer2edit demo --experts``: a behaviour's experts found in the embedded mixture, and switched off in its weights."""

from __future__ import annotations

import importlib.resources
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import artefact_folders, emit
from steer2edit.artefact.verify import verify
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.demo import invented_world
from steer2edit.demo.run import (
    RUNTIME,
    answers_to,
    changed_answers,
    demo_behavior,
    neutral_documents,
    one_thread,
    rates_of,
)
from steer2edit.errors import Steer2EditError
from steer2edit.experts.edits import Request, lower_experts
from steer2edit.experts.ranking import alignments, expert_table, ranking
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.report.experts import describe_ranking, expert_map, render_ranking
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, load_model, load_weights
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.meet import at
from steer2edit.strength.neutral_texts import NeutralTexts
from steer2edit.strength.settle import settle_strength

TOP = 4
DRAWS = 5
Pair = tuple[int, int]


def mixture_folder() -> Path:
    """The embedded mixture's checkpoint folder."""
    return Path(str(importlib.resources.files("steer2edit"))) / "demo" / "mixture"


def run(
    out: Path, *, behaviors: Sequence[str] = (), force: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Profile the mixture on each behaviour and switch experts off: those of its attribute, of its opposite, and random ones.

    The first of these becomes a checkpoint under ``out``, is verified, and is what is counted.
    """
    started = time.perf_counter()
    with one_thread():
        chosen = {name: demo_behavior(name) for name in behaviors or invented_world.BEHAVIORS}
        folders = {
            name: artefact_folders(out / name / "experts", ("checkpoint",), force)["checkpoint"] for name in chosen
        }
        checkpoint = replace(open_checkpoint(mixture_folder()), name="embedded-mixture")
        loaded = load_model(checkpoint, read_spec(checkpoint), RUNTIME)
        neutral = NeutralTexts(NeutralText(loaded, neutral_documents(), progress=progress))
        background = neutral_documents(seed=2)
        results = {}
        for name, behavior in chosen.items():
            statistics = capture_statistics(loaded, checkpoint, behavior, background=background, progress=progress)
            results[name] = _Behavior(checkpoint, loaded, statistics, neutral, name, progress).run(folders[name], force)
    ok = all(one["verified"]["ok"] for one in results.values())
    return {"ok": ok, "behaviors": results, "seconds": time.perf_counter() - started}


class _Behavior:
    """One behaviour's profile, masks and edits on the mixture."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loaded: LoadedModel,
        statistics: Statistics,
        neutral: NeutralTexts,
        name: str,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.loaded, self.statistics, self.neutral = checkpoint, loaded, statistics, neutral
        self.name, self.progress, self.tasks = name, progress, invented_world.tasks(name)

    def run(self, folder: Path, force: bool) -> dict[str, Any]:
        loaded, spec = self.loaded, self.loaded.spec
        aligned = alignments(self.statistics, spec, self.checkpoint, self.progress)
        table = expert_table(self.statistics, alignment=aligned)
        ranked = ranking(table, TOP, "positive")
        own = [(one.layer, one.expert) for one in ranked]
        other = [(one.layer, one.expert) for one in ranking(table, TOP, "negative")]

        plan = self.masked(own)
        lowering = emit(plan, self.checkpoint, spec, "checkpoint", folder, force=force, progress=self.progress)
        checked = verify(folder, self.checkpoint.path, runtime=RUNTIME, progress=self.progress)
        before = answers_to(loaded, self.tasks)
        after = answers_to(replace(loaded, model=load_weights(folder, RUNTIME)), self.tasks)
        kl = at(partial(edited, loaded, plan), self.neutral.budget).divergence.kl
        rows = [
            {"model": "base", **rates_of(self.tasks, before), "kl": 0.0},
            {"model": f"the attribute's {TOP} experts off (checkpoint)", **rates_of(self.tasks, after), "kl": kl},
            {"model": f"its opposite's {TOP} experts off", **self.measured(self.masked(other))},
            self.random_masks({*own, *other}),
            *self.edits(kl),
        ]
        plot, note = folder.parent / "experts.png", ""
        try:
            expert_map(table, plot, own)
        except Steer2EditError as error:
            note = str(error)
        return {
            "rows": rows,
            "profile": describe_ranking(table, ranked),
            "ranking": render_ranking(table, ranked),
            "grade": plan.method["grade"],
            "exactness": lowering.exactness,
            "verified": {
                "folder": str(folder),
                "ok": checked.ok,
                "problems": list(checked.problems),
                **checked.numbers,
            },
            "samples": changed_answers(self.tasks, before, after),
            "heatmap": "" if note else str(plot),
            "note": note,
        }

    def masked(self, experts: Sequence[Pair]) -> EditPlan:
        return lower_experts(self.checkpoint, self.loaded.spec, Request.of(experts))

    def measured(self, plan: EditPlan) -> dict[str, float]:
        apply = partial(edited, self.loaded, plan)
        with apply(1.0):
            rates = rates_of(self.tasks, answers_to(self.loaded, self.tasks))
        return {**rates, "kl": at(apply, self.neutral.budget).divergence.kl}

    def random_masks(self, taken: set[Pair]) -> dict[str, Any]:
        """As many experts at random, none of those that were ``taken``: the mean over draws, and each draw."""
        rng = random.Random(f"experts {self.name}")
        free = [(r.layer, e) for r in self.loaded.spec.routers for e in range(r.experts) if (r.layer, e) not in taken]
        drawn: list[list[Pair]] = []
        while len(drawn) < DRAWS:
            one = sorted(rng.sample(free, TOP))
            if one not in drawn:
                drawn.append(one)
        draws = [self.measured(self.masked(experts)) for experts in drawn]
        mean = {key: fmean(one[key] for one in draws) for key in draws[0]}
        return {"model": f"{TOP} random experts off, mean of {DRAWS} draws", **mean, "draws": draws}

    def edits(self, kl: float) -> list[dict[str, Any]]:
        """Edits inside the experts and elsewhere, towards the attribute and away from it, at the KL of the mask."""
        scoring, rows = Scoring(self.checkpoint, self.loaded.spec, self.statistics), []
        for method, label in (("component", "component edit"), ("steering", "default edit")):
            plan = make_plan(scoring, method=method, progress=self.progress)
            for sign, way in ((-1.0, "away from it"), (1.0, "towards it")):
                settled = settle_strength(self.loaded, plan.scaled(sign), kl_budget=kl, neutral=self.neutral)
                rows.append({"model": f"{label}, {way}", **self.measured(settled)})
        return rows


def render(result: dict[str, Any]) -> str:
    """The demo's result as text."""
    parts = []
    for name, one in result["behaviors"].items():
        labels = invented_world.LABELS[name]
        table = []
        for row in one["rows"]:
            cells = [f"{row['attribute']:.0%}", f"{row['utility']:.0%}"]
            if "draws" in row:
                cells = [_spread(row, kind) for kind in ("attribute", "utility")]
            table.append([row["model"], *cells, f"{row['kl']:.4f}"])
        headers = [name, labels["attribute"], labels["utility"], "KL (nats/token)"]
        parts += [one["ranking"], "", tabulate(table, headers=headers, stralign="right", disable_numparse=True)]
        for sample in one["samples"]:
            parts.append(f"  {sample['prompt']}\n    base    {sample['base']}\n    masked  {sample['edited']}")
        check = one["verified"]
        state = "verified" if check["ok"] else f"FAILED {check['problems']}"
        numbers = check.get("experts", {})
        told = [
            text.format(numbers[key])
            for key, text in (
                ("selected", "chosen by {:.0%} of the probe's tokens"),
                ("reference_difference", "logits within {:.1e} of the masked reference's"),
            )
            if key in numbers
        ]
        parts.append(f"  {one['grade']}\n  checkpoint {check['folder']}  {state}: {', '.join(told)}")
        parts.append(f"  map        {one['heatmap'] or one['note']}")
        parts.append("")
    parts.append(f"{result['seconds']:.1f} s")
    return "\n".join(parts)


def _spread(row: dict[str, Any], kind: str) -> str:
    values = [one[kind] for one in row["draws"]]
    return f"{row[kind]:.0%} [{min(values):.0%}, {max(values):.0%}]"
