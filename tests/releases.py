"""What the installed transformers knows: a test of a family is skipped, with the reason, where the family came later."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from steer2edit.architecture.releases import RUNS_SINCE


def config_class(model_type: str) -> Any:
    """transformers' config class of a model type; ends the test as skipped where the installed transformers is too old."""
    import transformers

    known = model_type in transformers.CONFIG_MAPPING
    works = Version(transformers.__version__) >= Version(RUNS_SINCE.get(model_type, "5"))
    if not works or (not known and Version(transformers.__version__) < newest_tested()):
        pytest.skip(f"transformers {transformers.__version__} does not run {model_type} yet")
    return transformers.CONFIG_MAPPING[model_type]


@functools.cache
def newest_tested() -> Version:
    """The transformers of constraints.txt: from there on, every family has to be known."""
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition(";")[0].strip() for line in lines)
    return max(Version(pin.removeprefix("transformers==")) for pin in pins if pin.startswith("transformers=="))
