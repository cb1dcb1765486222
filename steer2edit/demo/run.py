"""``steer2edit demo``: the real pipeline on the embedded model, and what the edit did beside activation steering."""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import artefact_folders, emit
from steer2edit.artefact.verify import verify
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.demo import invented_world
from steer2edit.engines.generation import generate
from steer2edit.errors import Steer2EditError
from steer2edit.methods import make_plan
from steer2edit.progress import Progress, silent
from steer2edit.report.figures import heatmap
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.meet import at
from steer2edit.strength.neutral_texts import NeutralTexts
from steer2edit.strength.settle import settle_strength

KL_BUDGET = 0.0025
STEERING = (0.25, 0.5, 1.0, 2.0)
RUNTIME = Runtime(device="cpu", dtype="float32")
_NEUTRAL_DOCUMENTS = 150
_SAMPLES = 3


def model_folder() -> Path:
    """The embedded model's checkpoint folder."""
    return Path(str(importlib.resources.files("steer2edit"))) / "demo" / "model"


def demo_behavior(name: str) -> Behavior:
    """Contrast data of one of the world's behaviours. Raises Steer2EditError naming the known ones."""
    if name not in invented_world.BEHAVIORS:
        raise Steer2EditError(f"the demo has no behaviour {name!r}; it has {', '.join(invented_world.BEHAVIORS)}")
    rows = invented_world.contrast_rows(name)
    return Behavior(
        name, [Example(row["prompt"], row[label], label, name, i) for i, row in enumerate(rows) for label in LABELS]
    )


def neutral_documents(seed: int = 1) -> list[str]:
    """Documents of the world, all topics mixed: for the KL, and with another seed as background."""
    return [prompt + response for prompt, response in invented_world.corpus(seed=seed, size=_NEUTRAL_DOCUMENTS)]


def run(
    out: Path, *, behaviors: Sequence[str] = (), force: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Compile each behaviour into both targets under ``out``, verify them, and count attribute and utility."""
    started = time.perf_counter()
    with one_thread():
        results = _run_all(out, behaviors, force, progress)
    ok = all(check["ok"] for one in results.values() for check in one["verified"].values())
    return {"ok": ok, "behaviors": results, "seconds": time.perf_counter() - started}


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch has one thread: for matrices as small as these, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_all(out: Path, behaviors: Sequence[str], force: bool, progress: Progress) -> dict[str, Any]:
    chosen = {name: demo_behavior(name) for name in behaviors or invented_world.BEHAVIORS}
    folders = {name: artefact_folders(out / name, ("checkpoint", "lora"), force) for name in chosen}
    checkpoint = replace(open_checkpoint(model_folder()), name="embedded-model")
    loaded = load_model(checkpoint, read_spec(checkpoint), RUNTIME)
    # small batches of this model's activations stay in a core's cache
    neutral = NeutralTexts(NeutralText(loaded, neutral_documents(), batch_tokens=1024, progress=progress))
    return {
        name: _run_one(checkpoint, loaded, behavior, neutral, folders[name], force, progress)
        for name, behavior in chosen.items()
    }


def _run_one(
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    behavior: Behavior,
    neutral: NeutralTexts,
    folders: dict[str, Path],
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    spec = loaded.spec
    background = neutral_documents(seed=2)
    statistics = capture_statistics(loaded, checkpoint, behavior, background=background, progress=progress)
    scoring = Scoring(checkpoint, spec, statistics)
    plan = make_plan(scoring, progress=progress)
    plan = settle_strength(loaded, plan, kl_budget=KL_BUDGET, neutral=neutral)
    verified = {}
    for target, folder in folders.items():
        emit(plan, checkpoint, spec, target, folder, force=force, progress=progress)
        result = verify(folder, checkpoint.path, runtime=RUNTIME, progress=progress)
        verified[target] = {"folder": str(folder), "ok": result.ok, "problems": list(result.problems), **result.numbers}

    artefact = replace(loaded, model=load_weights(folders["checkpoint"], RUNTIME))
    tasks = invented_world.tasks(behavior.name)
    before, after = (answers_to(model, tasks) for model in (loaded, artefact))
    rows = [
        {"model": "base", **rates_of(tasks, before), "kl": 0.0},
        {"model": "edited checkpoint", **rates_of(tasks, after), "kl": plan.measured.kl},
    ]
    component = make_plan(scoring, method="component", progress=progress)
    component = settle_strength(loaded, component, kl_budget=KL_BUDGET, neutral=neutral)
    with edited(loaded, component):
        rates = rates_of(tasks, answers_to(loaded, tasks))
    rows.append({"model": "Steer2Edit's component edit", **rates, "kl": component.measured.kl})
    vectors = {site.key: statistics.difference(site.key).float() for site in spec.sites}
    for strength in STEERING:
        apply = partial(steered, loaded, vectors)
        with apply(strength):
            rates = rates_of(tasks, answers_to(loaded, tasks))
        kl = at(apply, neutral.budget, strength).divergence.kl
        rows.append({"model": f"steering × {strength:g}", **rates, "kl": kl})
    samples = changed_answers(tasks, before, after)
    plots, note = [], ""
    for drawn, name in ((plan, "heatmap.png"), (component, "heatmap-component.png")):
        plot = folders["checkpoint"].parent / name
        try:
            heatmap(drawn, plot)
            plots.append(str(plot))
        except Steer2EditError as error:
            note = str(error)
    return {"rows": rows, "verified": verified, "samples": samples, "heatmaps": plots, "note": note}


def render(result: dict[str, Any]) -> str:
    """The demo's result as text."""
    parts = []
    for name, one in result["behaviors"].items():
        labels = invented_world.LABELS[name]
        table = [
            [row["model"], f"{row['attribute']:.0%}", f"{row['utility']:.0%}", f"{row['kl']:.3f}"]
            for row in one["rows"]
        ]
        headers = [name, labels["attribute"], labels["utility"], "KL (nats/token)"]
        parts.append(tabulate(table, headers=headers, stralign="right", disable_numparse=True))
        for sample in one["samples"]:
            parts.append(f"  {sample['prompt']}\n    base    {sample['base']}\n    edited  {sample['edited']}")
        for target, check in one["verified"].items():
            state = "verified" if check["ok"] else f"FAILED {check['problems']}"
            difference = f"logits within {check['difference']:.1e} of base + plan" if "difference" in check else ""
            parts.append(f"  {target:10s} {check['folder']}  {state}: {difference}")
        parts.append(f"  heat-maps  {', '.join(one['heatmaps']) or one['note']}")
        parts.append("")
    parts.append(f"{result['seconds']:.1f} s")
    return "\n".join(parts)


def answers_to(loaded: LoadedModel, tasks: Sequence[invented_world.Task]) -> list[str]:
    """What the model writes after each task's prompt."""
    found = generate(loaded, [task.prompt for task in tasks], max_new_tokens=40)
    return [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def rates_of(tasks: Sequence[invented_world.Task], answers: Sequence[str]) -> dict[str, float]:
    """The shares of attribute and of utility tasks that pass."""
    rates = {}
    for kind in ("attribute", "utility"):
        passed = [task.grade(answer) for task, answer in zip(tasks, answers, strict=True) if task.kind == kind]
        rates[kind] = sum(passed) / len(passed)
    return rates


def changed_answers(
    tasks: Sequence[invented_world.Task], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """A few attribute tasks whose answer changed, those that changed what is counted first."""
    asked = [i for i, task in enumerate(tasks) if task.kind == "attribute" and before[i] != after[i]]
    changed = sorted(asked, key=lambda i: tasks[i].grade(before[i]) == tasks[i].grade(after[i]))
    return [{"prompt": tasks[i].prompt, "base": before[i], "edited": after[i]} for i in changed[:_SAMPLES]]
