"""The experiments of Steer2Edit (arXiv 2602.09870), and MoTE's count of changed answers (arXiv 2502.11096), on any model.

Each is one command. On a GPU, for the models of the papers (the public data sets are files that you fetch yourself):

    python benchmarks/paper.py truthful google/gemma-2-2b-it --data TruthfulQA.jsonl --out truthful
    python benchmarks/paper.py truthful meta-llama/Meta-Llama-3-8B-Instruct --data TruthfulQA.jsonl --out truthful
    python benchmarks/paper.py length Qwen/Qwen3-4B-Thinking-2507 --data gsm8k.jsonl --max-new-tokens 4096 --out length
    python benchmarks/paper.py refusal mistralai/Mistral-7B-Instruct-v0.2 --out refusal
    python benchmarks/paper.py experts deepseek-ai/DeepSeek-V2-Lite-Chat --behavior cautious --out experts

and on a CPU in minutes:

    python benchmarks/paper.py truthful HuggingFaceTB/SmolLM2-135M-Instruct --data TruthfulQA.jsonl --limit 60 --out truthful

TruthfulQA's file has the columns question, best_answer, correct_answers, incorrect_answers; GSM8K's question and answer. One half
of a file's questions makes the edit, the other half measures it. Refusal is tested by its format on benign requests alone.

Rows are the base, the default edit, the component edit, activation steering and three random directions, each at every --kl, and
an instruction. Each row is kept in --out when it is done, and the same command goes on after a kill. With --engine vllm the
answers are written by vLLM, of edits as adapters; hooks it does not have, so activation steering is left out, and this is said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from paper_data import Experiment, length, refusal, truthful

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.engines.vllm_engine import VllmCandidates
from steer2edit.errors import DataError, Steer2EditError
from steer2edit.evaluation.baselines import instructed, random_direction, steering_at, to_kl
from steer2edit.evaluation.evaluate import Candidate, Evaluation, Row, measure, open_candidate, plan_candidate
from steer2edit.evaluation.metrics import Sample
from steer2edit.evaluation.suite import Suite
from steer2edit.evaluation.summary import summary
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.report.tables import render_evaluation, steerable_lines
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts

Make = Callable[[], list[Candidate]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("truthful", "length", "refusal", "experts"))
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="the public data set, as JSON lines")
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
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(device=options.device, dtype=options.dtype))
    if options.experiment == "experts":
        from paper_experts import count_changed

        count_changed(checkpoint, loaded, options)
        return
    experiment = data_of(options, loaded)
    costs = neutral_texts(loaded, limit=options.kl_rows)
    suite = Suite(
        experiment.questions,
        experiment.utility,
        costs,
        patterns=experiment.patterns,
        function=experiment.function,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
    )
    if options.engine == "vllm":
        suite = replace(suite, run=VllmCandidates(options.dtype, min(loaded.context, 8192)))
    scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, experiment.behavior))
    rows = Rows(options.out / "rows.jsonl", identity(options, checkpoint))
    tasks = suite.tasks("report")
    for name, make in candidates(options, checkpoint, loaded, scoring, experiment, costs):
        if name in rows.done:
            continue
        for candidate in make():
            rows.add(name, measure(candidate, tasks))
            print(f"{name} done in {rows.done[name][-1].seconds:.0f} s", file=sys.stderr, flush=True)
    metrics = tuple(metric for task in tasks for metric in task.metrics)
    context = {
        **suite.context("report"),
        "model": checkpoint.name,
        "experiment": options.experiment,
        "kl_in": costs.budget.kind,
    }
    for budget in options.kl or [0.05, 0.2]:
        mine = [
            row
            for name, there in rows.done.items()
            if name.endswith(f"@{budget:g}") or "@" not in name
            for row in there
        ]
        mine.sort(key=lambda row: row.kind != "base")
        found = Evaluation(metrics, tuple(mine), {**context, "kl": budget}, tuple(suite.prompts("report")))
        found.save(options.out / f"evaluation-{budget:g}.json")
        (options.out / f"summary-{budget:g}.json").write_text(json.dumps(summary(found), indent=1) + "\n")
        print(f"\n{options.experiment}, {checkpoint.name}, KL {budget:g} in {costs.budget.kind}\n")
        print("\n".join([*experiment.notes, render_evaluation(found), *steerable_lines(found)]))


def data_of(options: argparse.Namespace, loaded: LoadedModel) -> Experiment:
    """The experiment's data."""
    if options.experiment == "truthful":
        return truthful(options.data, options.probe)
    if options.experiment == "length":
        return length(options.data, options.probe, loaded, options.max_new_tokens)
    return refusal(options.probe, loaded, options.max_new_tokens)


def candidates(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    scoring: Scoring,
    experiment: Experiment,
    neutral: NeutralTexts,
) -> Iterator[tuple[str, Make]]:
    """Each row's name and what makes it: a row that is there already costs nothing."""

    @contextmanager
    def as_it_is() -> Iterator[LoadedModel]:
        yield loaded

    vllm = options.engine == "vllm"
    yield "base", lambda: [Candidate("base", as_it_is, "base")]

    def settled(plan: EditPlan, name: str, kind: str, kl: float, note: str) -> list[Candidate]:
        found = to_kl(loaded, plan, neutral, kl, name)
        if not vllm:
            return [plan_candidate(loaded, name, found, kind, note)]
        folder = options.out / "adapters" / f"{name.replace(' ', '-')}-{kl:g}"
        emit(found, checkpoint, loaded.spec, "lora", folder, force=True)
        opened = open_candidate(loaded, checkpoint, str(folder))
        return [replace(opened, name=name, kind=kind, note=note)]

    default = make_plan(scoring)
    component = make_plan(scoring, method="component")
    yield "instruction", lambda: instructed(Candidate("base", as_it_is), loaded, experiment.instruction)[:1]
    if vllm:
        print("note: vLLM runs no hooks: activation steering is not measured", file=sys.stderr)
    for kl in options.kl or [0.05, 0.2]:
        yield f"edit@{kl:g}", lambda kl=kl: settled(default, "default edit", "edit", kl, "steering")  # type: ignore[misc]
        yield (
            f"component@{kl:g}",
            lambda kl=kl: settled(component, "component edit", "edit", kl, "component"),  # type: ignore[misc]
        )
        if not vllm:
            yield f"steering@{kl:g}", lambda kl=kl: [steering_at(loaded, scoring, neutral, kl)]  # type: ignore[misc]
        for i in range(3):
            yield (
                f"random {i + 1}@{kl:g}",
                lambda kl=kl, i=i: settled(  # type: ignore[misc]
                    random_direction(default, i), f"random direction {i + 1}", "random", kl, "at equal KL"
                ),
            )


class Rows:
    """Rows as lines of JSON, kept when each is done; a file of other settings is refused."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self.done: dict[str, list[Row]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            stored = json.loads(line)
            if stored["identity"] != identity:
                raise DataError(f"{path} holds rows of other settings or another model: give another --out")
            self.done.setdefault(stored["name"], []).append(_row(stored["row"]))
        with path.open("r+b") as file:
            file.truncate(whole)

    def add(self, name: str, row: Row) -> None:
        """Keep a row."""
        stored = {"identity": self._identity, "name": name, "row": asdict(row)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stored) + "\n")
            file.flush()
        self.done.setdefault(name, []).append(row)


def _row(stored: dict[str, Any]) -> Row:
    def rebuilt(values: Any) -> Any:
        return None if values is None else tuple(values)

    samples = {
        name: Sample(tuple(one["values"]), rebuilt(one["weights"]), rebuilt(one["groups"]))
        for name, one in stored.pop("samples").items()
    }
    return Row(samples=samples, answers=tuple(stored.pop("answers")), **stored)


def identity(options: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """A digest of all that a row's numbers depend on."""
    apart = {"out", "kl", "device"}
    settings = {key: str(value) for key, value in vars(options).items() if key not in apart}
    if options.data is not None:
        settings["data"] = hashlib.sha256(options.data.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([checkpoint.fingerprint, settings], sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
