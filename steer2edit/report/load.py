"""Reading the contents of a report page from a study, an artefact or a plan."""

from __future__ import annotations

from pathlib import Path

from steer2edit.artefact.receipt import read_receipt
from steer2edit.errors import PlanError
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.files.layout import EVALUATION, PLAN
from steer2edit.plan import EditPlan
from steer2edit.report.page import Report
from steer2edit.search.study import KNEE, RESULT
from steer2edit.search.tune import read_study


def read_report(source: Path, evaluation: Path | None = None) -> Report:
    """The contents of a report, from a study's folder, an artefact's folder, or a plan file.

    ``evaluation`` is a file of ``eval -o``; it replaces the evaluation in the folder. Raises PlanError for anything else.
    """
    measured = Evaluation.load(evaluation) if evaluation is not None else None
    if source.suffix == ".json" and source.is_file():
        raise PlanError(
            f"{source} is a JSON file; expected a study's or an artefact's folder, or a plan, beside which --evaluation {source} "
            "takes a file of eval -o"
        )
    if source.is_file():
        return Report(EditPlan.load(source), measured)
    if (source / RESULT).is_file():
        study = read_study(source / RESULT)
        if not (source / KNEE).is_file():
            raise PlanError(f"the study in {source} has no front yet: no trial was better than the base")
        stored = source / "evaluation.json"
        measured = Evaluation.load(stored) if measured is None and stored.is_file() else measured
        return Report(EditPlan.load(source / KNEE), measured, trials=study["trials"], settings=study["settings"])
    if source.is_dir():
        receipt = read_receipt(source)
        stored = source / EVALUATION
        measured = Evaluation.load(stored) if measured is None and stored.is_file() else measured
        return Report(EditPlan.load(source / PLAN), measured, receipt=receipt)
    raise PlanError(f"{source} does not exist; expected a study's or an artefact's folder, or a plan")
