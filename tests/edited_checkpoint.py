"""A checkpoint with edits, for the tests of differences and reverts."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from test_faults import random_plan

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.plan import EditPlan


def edited_checkpoint(base: Path, out: Path) -> EditPlan:
    """Write a plan of four edits as a checkpoint into ``out``."""
    checkpoint = open_checkpoint(base)
    plan = random_plan(base, sites=4)
    emit(plan, checkpoint, read_spec(checkpoint), "checkpoint", out)
    return plan


def resharded(folder: Path, out: Path) -> Path:
    """The same tensors in one file, as another tool may save them: no receipt, other shards."""
    checkpoint = open_checkpoint(folder)
    out.mkdir()
    save_file({name: checkpoint.read(name) for name in checkpoint.tensors}, out / "model.safetensors")
    shutil.copyfile(folder / "config.json", out / "config.json")
    return out
