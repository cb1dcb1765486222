"""The experiments of Steer2Edit (arXiv 2602.09870), and MoTE's count of changed answers (arXiv 2502.11096), on any model.

Each is one command. On a GPU, for the models of the papers (the public data sets are files that you fetch yourself):

    python benchmarks/paper.py truthful google/gemma-2-2b-it --data TruthfulQA.jsonl --out truthful
    python benchmarks/paper.py truthful meta-llama/Meta-Llama-3-8B-Instruct --data TruthfulQA.jsonl --out truthful
    python benchmarks/paper.py length Qwen/Qwen3-4B-Thinking-2507 --data gsm8k.jsonl --max-new-tokens 4096 --out length
    python benchmarks/paper.py refusal mistralai/Mistral-7B-Instruct-v0.2 --out refusal
    python benchmarks/paper.py experts deepseek-ai/DeepSeek-V2-Lite-Chat --behavior cautious --out experts

and on a CPU in minutes:

    python benchmarks/paper.py truthful HuggingFaceTB/SmolLM2-135M-Instruct --data TruthfulQA.jsonl --limit 60 --out truthful

--data is a file (JSON lines, JSON, CSV, Parquet) or a dataset on the Hub (user/name:file). TruthfulQA's has the columns question,
best_answer, correct_answers and incorrect_answers, or those of the original CSV; GSM8K's question and answer. One half of the
questions makes the edit, the other half measures it. Refusal is tested by its format on benign requests alone.

Rows are the base, the default edit, the component edit, activation steering and three random directions, each at every --kl, and
an instruction. The second and third random direction are measured in brief: the cost, and the attribute by likelihood where it
can be had so. The model's own answers, the capture and each row are kept in --out when they are there, and the same command goes
on after a kill. With --engine vllm the answers are written by vLLM, of edits as adapters; hooks it does not have, so activation
steering is left out, and this is said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from greedy import through_transformers
from paper_data import Experiment, length, read_sums, read_truths, refusal, truthful
from paper_journal import Journal, row_of, stored_row

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.engines.vllm_engine import VllmCandidates
from steer2edit.errors import Steer2EditError
from steer2edit.evaluation.baselines import instructed, near, random_direction, steering_at
from steer2edit.evaluation.candidates import Candidate, open_candidate, plan_candidate
from steer2edit.evaluation.evaluate import Evaluation, measure
from steer2edit.evaluation.suite import Suite
from steer2edit.evaluation.summary import summary
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.report.tables import render_evaluation, steerable_lines
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.meet import meet
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts

KLS = (0.05, 0.2)
Make = Callable[[], Candidate]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("truthful", "length", "refusal", "experts"))
    parser.add_argument("model")
    parser.add_argument("--data", help="the public data set: a file, or a dataset on the Hub")
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--kl", action="append", type=float, help="repeatable; default: 0.05 0.2")
    parser.add_argument("--probe", type=int, default=200, help="questions behind the vector (default %(default)s)")
    parser.add_argument("--limit", type=int, help="questions measured on, of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default %(default)s)")
    parser.add_argument("--kl-rows", type=int, default=32, help="answers and windows behind a KL (default %(default)s)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--behavior", default="cautious", help="experts: the behaviour whose experts are switched off")
    parser.add_argument("--top", type=int, default=10, help="experts: how many (default %(default)s)")
    options = parser.parse_args()
    if options.experiment in ("truthful", "length") and options.data is None:
        parser.error(f"{options.experiment} needs --data FILE")
    try:
        run(options)
    except Steer2EditError as error:
        parser.exit(2, f"error: {error}\n")


def run(options: argparse.Namespace) -> None:
    """One experiment on one model: measure the rows that are missing, save and print."""
    data = {"truthful": read_truths, "length": read_sums}.get(options.experiment, lambda _: [])(options.data)
    checkpoint = open_checkpoint(options.model)
    journal = Journal(options.out, settings_of(options, checkpoint, data))
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(device=options.device, dtype=options.dtype))
    if options.experiment == "experts":
        from paper_experts import count_changed

        count_changed(checkpoint, loaded, options, journal)
        return
    experiment = data_of(options, loaded, data, journal)
    costs = neutral_texts(loaded, limit=options.kl_rows)
    suite = Suite(
        experiment.questions,
        experiment.utility,
        costs,
        metric=experiment.metric,
        function=experiment.function,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
    )
    if options.engine == "vllm":
        suite = replace(suite, engine=VllmCandidates(options.dtype, min(loaded.context, 8192)))
        print("note: vLLM runs no hooks: activation steering is not measured", file=sys.stderr)
    tasks = suite.tasks("report")
    bench = Bench(checkpoint, loaded, experiment, costs, journal, options.engine == "vllm")
    budgets = options.kl or list(KLS)
    for name, make in bench.candidates(budgets):
        if name not in journal.rows:
            journal.add(name, stored_row(row := measure(make(), tasks)))
            print(f"{name} done in {row.seconds:.0f} s", file=sys.stderr, flush=True)
    metrics = tuple(metric for task in tasks for metric in task.metrics)
    context = {
        **suite.context("report"),
        "model": checkpoint.name,
        "experiment": options.experiment,
        "kl_in": costs.budget.kind,
    }
    for budget in budgets:
        mine = [row_of(journal.rows[name]) for name, _ in bench.candidates([budget])]
        found = Evaluation(metrics, tuple(mine), {**context, "kl": budget}, tuple(suite.prompts("report")))
        found.save(options.out / f"evaluation-{budget:g}.json")
        (options.out / f"summary-{budget:g}.json").write_text(json.dumps(summary(found), indent=1) + "\n")
        print(f"\n{options.experiment}, {checkpoint.name}, KL {budget:g} in {costs.budget.kind}\n")
        print("\n".join([*experiment.notes, render_evaluation(found), *steerable_lines(found)]))


def data_of(
    options: argparse.Namespace, loaded: LoadedModel, data: Sequence[Mapping[str, Any]], journal: Journal
) -> Experiment:
    """The experiment's data; the model's own answers that it is made of are written once."""
    if options.experiment == "truthful":
        return truthful(data, options.probe)
    write = journal.writing(through_transformers)
    if options.experiment == "length":
        return length(data, options.probe, loaded, options.max_new_tokens, write)
    return refusal(options.probe, loaded, options.max_new_tokens, write)


@dataclass(frozen=True)
class Bench:
    """A loaded model with an experiment's data, which makes the candidates.

    It captures when the first edit is asked for.
    """

    checkpoint: Checkpoint
    loaded: LoadedModel
    experiment: Experiment
    neutral: NeutralTexts
    journal: Journal
    vllm: bool = False

    def candidates(self, budgets: Sequence[float]) -> Iterator[tuple[str, Make]]:
        """Each row's name and what makes it, the base first: a row that is there already costs nothing."""
        yield "base", self._base
        yield "instruction", lambda: instructed(self._base(), self.loaded, self.experiment.instruction)[0]
        for kl in budgets:
            yield f"edit@{kl:g}", partial(self._edit, "default edit", "steering", kl)
            yield f"component@{kl:g}", partial(self._edit, "component edit", "component", kl)
            if not self.vllm:
                yield f"steering@{kl:g}", partial(self._steering, kl)
            for i in range(3):
                yield f"random {i + 1}@{kl:g}", partial(self._random, i, kl)

    @cached_property
    def scoring(self) -> Scoring:
        """The capture's scores."""
        statistics = self.journal.statistics(
            lambda keep: capture_statistics(self.loaded, self.checkpoint, self.experiment.behavior, keep=keep)
        )
        return Scoring(self.checkpoint, self.loaded.spec, statistics)

    def _base(self) -> Candidate:
        @contextmanager
        def enter() -> Iterator[LoadedModel]:
            yield self.loaded

        return Candidate("base", enter, "base")

    def _edit(self, name: str, method: str, kl: float) -> Candidate:
        plan = make_plan(self.scoring, method=method)
        strength = meet(partial(edited, self.loaded, plan), self.neutral.budget, kl, name).strength
        return self._at(plan, strength, name, "edit", method, kl)

    def _steering(self, kl: float) -> Candidate:
        return steering_at(self.loaded, self.scoring, self.neutral, kl)

    def _random(self, number: int, kl: float) -> Candidate:
        """Directions of one size cost nearly the same: each begins at the first one's strength, and takes few passes."""
        plan, name = random_direction(make_plan(self.scoring), number), f"random direction {number + 1}"
        start = self.journal.rows[f"random 1@{kl:g}"]["strength"] if number else None
        strength = near(partial(edited, self.loaded, plan), self.neutral.budget, kl, start, name).strength
        return replace(self._at(plan, strength, name, "random", "at equal KL", kl), brief=number > 0)

    def _at(self, plan: EditPlan, strength: float, name: str, kind: str, note: str, kl: float) -> Candidate:
        scaled = plan.scaled(strength)
        if self.vllm:
            folder = self.journal.folder / "adapters" / f"{name.replace(' ', '-')}-{kl:g}"
            emit(scaled, self.checkpoint, self.loaded.spec, "lora", folder, force=True)
            made = open_candidate(self.loaded, self.checkpoint, str(folder))
        else:
            made = plan_candidate(self.loaded, name, scaled)
        return replace(made, name=name, kind=kind, note=note, strength=strength)


def settings_of(
    options: argparse.Namespace, checkpoint: Checkpoint, data: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """All that a row's numbers depend on."""
    apart = {"out", "kl", "device", "data", "model"}
    settings = {key: str(value) for key, value in vars(options).items() if key not in apart}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return {**settings, "model": checkpoint.fingerprint, "data": digest}


if __name__ == "__main__":
    main()
