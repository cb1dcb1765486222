"""The names of files inside an artefact's folder."""

from __future__ import annotations

RECEIPT = "steer2edit.json"
CARD = "README.md"
PLAN = "steer2edit/plan.safetensors"
PLAN_FILE = "plan.safetensors"
"""A plan that was published by itself."""
EVALUATION = "steer2edit/evaluation.json"
REPORT = "steer2edit/report.html"
INTERFERENCE = "steer2edit/interference.json"
"""What the plans of a composition share."""
TRADEOFF = "steer2edit/tradeoff.png"
"""The picture in a published card."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
