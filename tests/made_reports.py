"""Plans, evaluations, studies and reports made of numbers that no model gave, for the tests of figures and of the page."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from steer2edit.data.answers import LABELS
from steer2edit.data.contrast import Example
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.plan import Base, EditPlan, LowRank, Measured, Scores
from steer2edit.report.page import Report

METRICS = (
    Metric("KL", "utility", "less", "nats/token"),
    Metric("perplexity", "utility", "less", exponential=True),
    Metric("length", "attribute", "less", "tokens"),
    Metric("preferred", "attribute", "more"),
    Metric("repetition", "check", "less"),
)


def make_plan(
    layers: int = 3,
    heads: int = 4,
    neurons: int = 16,
    *,
    resampled: bool = True,
    lam: float = 1.0,
    name: str = "concise",
) -> EditPlan:
    """A plan with a table for every layer; 0 heads or neurons leave that kind out."""
    generator = torch.Generator().manual_seed(0)

    def table(count: int) -> Scores:
        g = torch.randn(count, generator=generator) * 0.12
        null = torch.randn(count, generator=generator) * 0.05
        width = 0.04 + 0.05 * torch.rand(count, generator=generator)
        strength = torch.where(g.abs() > 0.1, g * lam, torch.zeros(count))
        return (
            Scores(g, strength, g * 3, torch.stack((g - width, g + width)), null)
            if resampled
            else Scores(g, strength, g)
        )

    kinds = {"attn_out": heads, "mlp_out": neurons}
    scores = {f"{role}.{layer}": table(n) for layer in range(layers) for role, n in kinds.items() if n}
    edits = tuple(
        LowRank(f"model.layers.{i}.self_attn.o_proj.weight", torch.ones(8, 1), torch.full((1, 8), 0.02 * (i + 1)))
        for i in range(layers)
    )
    measured = {
        "strength": 0.83,
        "kl_budget": 0.05,
        "kl": 0.0483,
        "low": 0.043,
        "high": 0.054,
        "tokens": 4080,
        "base_perplexity": 32.29,
        "perplexity": 32.84,
        "quadratic": 0.05,
        "steps": [[1.0, 0.07], [0.83, 0.0483]],
    }
    data = {"name": name, "data": "d" * 64, "examples": {"positive": 48, "negative": 48}, "tokens": {"positive": 900}}
    base = Base("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac", "f" * 64)
    return EditPlan(
        base,
        edits,
        scores,
        {"name": "component", "rho_attn": 0.3, "layers": [0, layers - 1]},
        Measured.from_json(measured),
        data,
    )


def make_evaluation(
    questions: int = 24, *, edit: float = -0.45, random: float = -0.02, strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
) -> Evaluation:
    """Candidates whose answers are shortened by the shares ``edit`` and ``random``."""
    generator = torch.Generator().manual_seed(1)
    lengths = 60 + 60 * torch.rand(questions, generator=generator)
    windows = 16

    def row(name: str, kind: str, share: float, kl: float, note: str = "", strength: float | None = None) -> Row:
        spread = torch.randn(questions, generator=generator) * (0 if kind == "base" else 6)
        length = (lengths * (1 + share) + spread).clamp(min=1).round()
        tokens = (255.0,) * windows
        noise = 1 + 0.3 * torch.randn(windows, generator=generator)
        loss = [(3.47 + kl / 3 * float(x)) * 255 for x in noise]
        samples = {
            "KL": Sample(tuple(255 * kl * float(x) for x in noise), tokens),
            "perplexity": Sample(tuple(loss), tokens),
            "length": Sample(tuple(length.tolist())),
            "preferred": Sample(tuple((torch.rand(questions, generator=generator) < 0.4 - share).float().tolist())),
            "repetition": Sample(tuple((0.05 * torch.rand(questions, generator=generator)).tolist())),
        }
        said = "An egg takes eight minutes in boiling water." if kind in ("knee", "edit") else "Great question! " * 60
        answers = tuple(f"{said} ({i})" if i % 3 else f"Yes. ({i})" for i in range(questions))
        return Row(name, kind, samples, note, strength, answers, 1.0)

    rows = [
        row("base", "base", 0, 0),
        row("trial 12", "knee", edit, 0.048, "component"),
        row("trial 9", "front", edit / 2, 0.012, "steering"),
        row("trial 31", "front", edit * 1.3, 0.11, "steering"),
        *(
            row(f"steering × {s:g}", "steering", max(-0.3 * s, -0.85), 0.02 * s**2, "activation steering", s)
            for s in strengths
        ),
        *(row(f"random direction {i + 1}", "random", random, 0.048, "at equal KL") for i in range(3)),
        row("shuffled labels 1", "shuffled", -0.01, 0.047, "at equal KL"),
        row("sign flipped", "flipped", 0.3, 0.052, "at equal ‖ΔW‖"),
        row("whole matrices", "whole", -0.3, 0.049, "at equal KL"),
        row("ablation", "ablation", -0.1, 0.048, "at equal KL"),
    ]
    context = {"split": "report", "split_seed": 0, "questions": questions, "max_new_tokens": 160}
    prompts = tuple(f"How do I boil an egg, in {i} steps?" for i in range(questions))
    return Evaluation(METRICS, tuple(rows), context, prompts)


def make_trials(count: int = 24) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trials and settings of a study whose knee is trial 12."""
    trials: list[dict[str, Any]] = []
    for number in range(count):
        kl = 0.004 * 1.2**number
        value = 90 - 60 * (1 - 1 / (1 + 12 * kl)) + 7 * (number % 3)
        measured = number % 7 != 6
        trials.append(
            {
                "number": number,
                "params": {"method": "steering", "kl": kl, "first_layer": number % 5},
                "state": "complete" if measured else "pruned",
                "attribute": {"value": value, "low": value - 6, "high": value + 6, "count": 40} if measured else None,
                "utility": {"value": kl, "low": 0.9 * kl, "high": 1.1 * kl, "count": 16} if measured else None,
                "kl": kl,
                "front": number % 3 == 0 and measured,
                "knee": number == 12,
            }
        )
    given = {
        "attribute": {"name": "length", "goal": "less"},
        "utility": {"name": "KL", "goal": "less"},
        "seed": 3,
        "split_seed": 0,
        "sampler": "TPE",
        "trials": count,
    }
    return trials, given


def make_report(layers: int = 3, heads: int = 4, neurons: int = 16, questions: int = 24, **changed: Any) -> Report:
    """Everything a report can have."""
    trials, study = make_trials()
    receipt = {
        "target": "lora",
        "exactness": "exact",
        "notes": [],
        "versions": {"steer2edit": "0.1.0", "torch": "2.13"},
    }
    whole = Report(
        make_plan(layers, heads, neurons),
        make_evaluation(questions),
        receipt,
        trials,
        study,
        "steer2edit tune model --behavior concise",
    )
    return dataclasses.replace(whole, **changed)


HOSTILE = [
    '<script>alert("1")</script>',
    "'\"><img src=x onerror=alert(1)>",
    "]]></style>--><b>&amp;",
    "$x^{$_^",
    "\ud800\x00\x1b\n",
]


def hostile_report(text: str) -> Report:
    """A report in which every name and text that comes from data is ``text``."""
    plan = make_plan(2, 2, 4, name=text)
    origin = {"kind": "folder", "way": text, "kept": text, "offered": text, "verdict": text, "receipt": text}
    plan = dataclasses.replace(
        plan,
        base=Base(text, text, text),
        # a safetensors header is UTF-8: no tensor's name holds half a character
        edits=(dataclasses.replace(plan.edits[0], tensor=text.encode("utf-8", "replace").decode()),),
        method={"name": text, text: text, "nested": [{text: text}]},
        data={**plan.data, "data": text, "examples": {text: text}, "system": text, "origin": [origin]},
    )
    metrics = (Metric(f"{text}u", "utility", "less", text), Metric(f"{text}a", "attribute", "more", text))
    samples = {metric.name: Sample((1.0, 2.0, 4.0)) for metric in metrics}
    rows = [
        Row(f"{text}{i}", kind, samples, text, 1.0, (text + str(i),) * 3)
        for i, kind in enumerate(("base", "edit", "random", "steering", text))
    ]
    evaluation = Evaluation(metrics, tuple(rows), {text: text, "split": text}, (text,) * 3)
    trials, study = make_trials(6)
    study = {**study, "sampler": text, text: text, "attribute": {"name": text, "goal": text}}
    trials = [
        {**trial, "params": {text: text}, "state": trial["state"] if i else text} for i, trial in enumerate(trials)
    ]
    receipt = {"target": text, "exactness": text, "notes": [text], "versions": {text: text}}
    examples = [Example(text, text, label, text, 0) for label in LABELS]
    return Report(plan, evaluation, receipt, trials, study, text, examples)
