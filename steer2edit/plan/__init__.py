"""The plan: an ordered list of edits with their provenance, and the operations that an edit can be."""

from steer2edit.plan.edit_plan import BASE, DATA, METHOD, Base, EditPlan, Structure
from steer2edit.plan.measured import MEASURED, Divergence, Measured
from steer2edit.plan.merging import merge
from steer2edit.plan.operations import Assign, Bias, Edit, LowRank, NewBias, Scale, ScaleAdd
from steer2edit.plan.scores import Scores

__all__ = [
    "BASE", "DATA", "MEASURED", "METHOD", "Assign", "Base", "Bias", "Divergence", "Edit", "EditPlan", "LowRank",
    "Measured", "NewBias", "Scale", "ScaleAdd", "Scores", "Structure", "merge",
]  # fmt: skip
