"""Tasks of EleutherAI's lm-eval, run through that library on the same candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer2edit.errors import Steer2EditError, first_line
from steer2edit.evaluation.candidates import Candidate
from steer2edit.runtime.model import LoadedModel


def lm_eval(
    loaded: LoadedModel,
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """By task, a row for the base and each candidate: every metric with its standard error.

    ``include_path`` is a folder with task files of one's own. Raises Steer2EditError without lm-eval, or with its reason.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise Steer2EditError("tasks of lm-eval need that library: pip install 'steer2edit[lm-eval]'") from None
    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    if strange := [task for task in tasks if task not in known]:
        raise Steer2EditError(f"lm-eval has no task {', '.join(strange)}")
    found: dict[str, list[dict[str, Any]]] = {}

    def run(name: str, model: LoadedModel) -> None:
        harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
        try:
            results = simple_evaluate(
                model=harness, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0
            )["results"]
        except Exception as error:  # of whatever a task, its data or the Hub raises
            raise Steer2EditError(f"lm-eval failed on {', '.join(tasks)}: {first_line(error)}") from None
        for task, values in results.items():
            row = {"": name}
            row |= {key.replace(",none", ""): value for key, value in values.items() if isinstance(value, float)}
            found.setdefault(task, []).append(row)

    run("base", loaded)
    for candidate in candidates:
        with candidate.enter() as model:
            run(candidate.name, model)
    return found
