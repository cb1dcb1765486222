"""What each option of the default method does, at equal cost and on the selection half of the questions.

    python benchmarks/solver_options.py MODEL --behavior formal --behavior cautious --kl 0.1 0.2 --out options.jsonl

Every option set is brought to each KL on the model's own answers. A line of
the output has the option set, the strength, both KLs, and a value for every question: the margin, or the length in tokens where a
behaviour has prompts alone. With --knowledge N, answers to N knowledge questions are marked too; with --written N, the projection
of answers of 160 tokens to N questions, as the base reads them, and their loops. Lines that are there already are
not measured again, so that an interrupted run goes on. The table shows paired differences to activation steering and to the
default, with their bootstrap 95 % interval over questions.

Sets whose name begins with "try:" are not options of the method; solver_experiments.py makes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import solver_experiments
from right_choice import names_right
from tabulate import tabulate
from written import answers, projected

from steer2edit.architecture import read_spec
from steer2edit.bootstrap import estimate
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.degeneration import loops
from steer2edit.data.questions import Question, knowledge_questions, take
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.baselines import random_direction
from steer2edit.evaluation.metrics import Preference
from steer2edit.evaluation.projection import Projection
from steer2edit.methods import component, make_plan, steering
from steer2edit.plan import EditPlan
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.meet import Apply, meet
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts

STEERING = "activation steering"
WRITTEN = ("projection", "loops")
TOKENS, WRITTEN_TOKENS = 60, 160


@dataclass(frozen=True)
class Case:
    """A model with one behaviour: its scores, the questions of the selection half, and the texts of the cost."""

    loaded: LoadedModel
    scoring: Scoring
    behavior: Behavior
    questions: list[Question]
    knowledge: list[Question]
    written: list[Question]
    texts: NeutralTexts

    @property
    def layers(self) -> int:
        return self.scoring.spec.layers


def option_sets(case: Case) -> dict[str, Callable[[float], Apply]]:
    """By name, what makes the candidate for a KL: it is applied at a strength."""
    last = case.layers - 1
    everywhere, deeper = (0, last), (case.layers // 2, last)
    sets: dict[str, steering.Options] = {
        "default": steering.Options(),
        "contrast .5, prose .25, chat .25": steering.Options(background=0.25, chat=0.25),
        "contrast .8, prose .1, chat .1": steering.Options(background=0.1, chat=0.1),
        "no contrast in the moments": steering.Options(background=0.5, chat=0.5),
        "more prose: .2, .6, .2": steering.Options(background=0.6, chat=0.2),
        "no zero push": steering.Options(zero_push="none"),
        "zero push on prose": steering.Options(zero_push="prose"),
        "zero push on chat": steering.Options(zero_push="chat"),
        "all layers": steering.Options(layers=everywhere),
        "layers from a third": steering.Options(layers=(round(case.layers / 3), last)),
        "layers from two thirds": steering.Options(layers=(round(case.layers * 2 / 3), last)),
        "a third to five sixths": steering.Options(layers=(round(case.layers / 3), round(case.layers * 5 / 6) - 1)),
        "MLPs too": steering.Options(sites="both"),
        "MLPs alone": steering.Options(sites="mlp"),
        "unstable components too": steering.Options(stable=False),
        "columns apart": steering.Options(moments="diagonal"),
        "older default": steering.Options(background=0.5, layers=everywhere, **steering.UNSAID),
        "older default, deeper half": steering.Options(background=0.5, layers=deeper, **steering.UNSAID),
    }

    def made(options: Any, method: str = "steering") -> Apply:
        return applied(make_plan(case.scoring, method=method, options=options))

    def applied(plan: EditPlan) -> Apply:
        return partial(edited, case.loaded, plan)

    def vectors(first: int) -> Apply:
        sites = [site for site in case.scoring.spec.sites if site.layer >= first]
        each = {site.key: case.scoring.statistics.difference(site.vector_key).float() for site in sites}
        return partial(steered, case.loaded, each)

    found: dict[str, Callable[[float], Apply]] = {STEERING: lambda _: vectors(0)}
    found["activation steering, deeper half"] = lambda _: vectors(deeper[0])
    found |= {name: lambda _, options=options: made(options) for name, options in sets.items()}  # type: ignore[misc]
    found["random direction"] = lambda _: applied(random_direction(make_plan(case.scoring), 0))
    found["components"] = lambda _: made(component.Options(), "component")
    found["components, deeper half"] = lambda _: made(component.Options(layers=deeper), "component")
    experiments = solver_experiments.plans(case.loaded, case.scoring, case.behavior, case.texts.budget)
    found |= {f"try: {name}": lambda kl, make=make: applied(make(kl)) for name, make in experiments.items()}  # type: ignore[misc]
    return found


def measured(case: Case, apply: Apply, strength: float) -> dict[str, Any]:
    """Values by question of a candidate, and what it costs on the other text."""
    with apply(strength):
        result = values(case)
        wrote = answers(case.loaded, case.written, WRITTEN_TOKENS) if case.written else []
    # the base reads
    if projection := wrote and Projection.of(case.loaded, case.scoring.statistics):
        result["projection"] = projected(projection, case.written, wrote)
    if wrote:
        result["loops"] = [float(loops(one.ids or (), one.ended)) for one in wrote]
    return result


def values(case: Case) -> dict[str, Any]:
    """What is measured while a candidate is on the model."""
    pairs = [question for question in case.questions if question.positive]
    result: dict[str, Any] = {f"KL, {text.kind}": text.measure().kl for text in case.texts}
    if pairs:
        result["values"] = list(Preference(pairs).measure(case.loaded).samples["margin"].values)
    else:
        said = Answers(case.questions, max_new_tokens=TOKENS).measure(case.loaded)
        result["values"] = [-length for length in said.samples["length"].values]
    if case.knowledge:
        said = Answers(case.knowledge, max_new_tokens=TOKENS).measure(case.loaded)
        result["right"] = [float(names_right(a, q)) for a, q in zip(said.answers, case.knowledge, strict=True)]
        result["repetition"] = estimate(said.samples["repetition"].values).value
        result["length"] = estimate(said.samples["length"].values).value
    return result


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The behaviours one by one, on one loaded model."""
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    texts = neutral_texts(loaded, limit=options.rows)
    knowledge = [q for q in take(knowledge_questions(), "select") if q.choices]
    for name in options.behavior:
        behavior = Behavior.named(name)
        scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, behavior))
        half = take(builtin_questions(name) or [], "select")
        written = sorted(half, key=lambda q: q.digest[::-1])[: options.written]
        yield Case(loaded, scoring, behavior, half[: options.questions], knowledge[: options.knowledge], written, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", action="append", required=True)
    parser.add_argument("--kl", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--only", action="append", help="name of an option set (default: all but those to try)")
    parser.add_argument("--experiments", action="store_true", help="the sets to try, too")
    parser.add_argument("--questions", type=int, default=70, help="questions of a behaviour (default %(default)s)")
    parser.add_argument("--knowledge", type=int, default=0, help="knowledge questions to mark (default none)")
    parser.add_argument("--written", type=int, default=0, help="questions answered at length (default none)")
    parser.add_argument("--rows", type=int, default=30, help="answers or windows of the KL (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--out", type=Path, required=True, help="file of JSON lines; what it holds is not measured again"
    )
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    done = {tuple(line["key"]): line for line in lines}

    def keep(key: tuple[Any, ...], result: dict[str, Any]) -> None:
        done[key] = {"key": list(key), **result}
        with options.out.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")

    for case in cases(options):
        name, budget_text = case.behavior.name, case.texts.budget
        if (options.model, name, "base", 0.0) not in done:
            keep((options.model, name, "base", 0.0), measured(case, lambda _: nullcontext(), 0.0))
        sets = option_sets(case)
        tried = [one for one in sets if one.startswith("try:")]
        chosen = options.only or [one for one in sets if one not in tried]
        chosen += tried if options.experiments else []
        for one in dict.fromkeys([STEERING, *chosen]):
            for kl in [kl for kl in options.kl if (options.model, name, one, kl) not in done]:
                apply = sets[one](kl)
                strength = at_cost(apply, budget_text, kl)
                keep((options.model, name, one, kl), {"strength": strength, **measured(case, apply, strength)})
        print(table(done, options.model, name), flush=True)


def at_cost(apply: Apply, text: NeutralText, kl: float) -> float:
    """The strength that meets a KL."""
    return meet(apply, text, kl).strength


def table(done: dict[tuple[Any, ...], dict[str, Any]], model: str, behavior: str) -> str:
    """Each option set's mean, and its paired differences to activation steering and the default at the same KL."""
    rows = []
    for (owner, name, one, kl), line in done.items():
        if (owner, name) != (model, behavior):
            continue
        paired = {
            other: str(difference(line["values"], reference["values"]))
            for other in (STEERING, "default")
            if other != one and (reference := done.get((model, behavior, other, kl))) is not None
        }
        right = line.get("right", [])
        named = f"{sum(right)} of {len(right)}" if right else ""
        differences = [paired.get(other, "") for other in (STEERING, "default")]
        prose, repetition = (f"{line.get(what, 0):.3f}" for what in ("KL, prose", "repetition"))
        read = [f"{sum(line[what]) / len(line[what]):.3f}" if line.get(what) else "" for what in WRITTEN]
        rows.append([one, kl, str(estimate(line["values"])), *differences, prose, named, repetition, *read])
    heads = [
        behavior,
        "KL",
        "value",
        "minus activation steering",
        "minus default",
        "KL on prose",
        "right",
        "repetition",
        *WRITTEN,
    ]
    return str(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


def difference(values: list[float], others: list[float]) -> Any:
    """The mean of paired differences, with its interval."""
    return estimate([a - b for a, b in zip(values, others, strict=True)])


if __name__ == "__main__":
    main()
