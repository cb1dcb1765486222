"""The names of files inside an artefact's folder."""

from __future__ import annotations

RECEIPT = "steer2edit.json"


PLAN_FILE = "plan.safetensors"
"""A plan that was published by itself."""


CARD = "README.md"


PLAN = "steer2edit/plan.safetensors"


EVALUATION = "steer2edit/evaluation.json"


REPORT = "steer2edit/report.html"
