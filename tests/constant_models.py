"""Tiny models for the tests of constants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import llama_config, save_tiny
from family_configs import family_config

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.lowering import Writing
from steer2edit.methods import make_plan
from steer2edit.methods.constant import Options
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import LoadedModel, load_weights
from steer2edit.scoring.scores import Scoring

IDS = torch.tensor([[1, 5, 9, 44, 7, 20, 33, 8]])


class Model:
    """A tiny model on disk with statistics on the tests' rows."""

    def __init__(self, folder: Path, statistics: Any) -> None:
        self.folder, self.checkpoint = folder, open_checkpoint(folder)
        self.spec, self.statistics = read_spec(self.checkpoint), statistics
        self.scoring = Scoring(self.checkpoint, self.spec, statistics)

    def plan(self, **options: Any) -> EditPlan:
        return make_plan(self.scoring, method="constant", options=Options(**options))

    def emit(self, plan: EditPlan, to: str, out: Path, **writing: Any) -> Path:
        emit(plan, self.checkpoint, self.spec, to, out, writing=Writing(**writing))
        return out

    def loaded(self, folder: Path | None = None) -> LoadedModel:
        return LoadedModel(load_weights(folder or self.folder), None, self.spec)


def models_in(root: Path, statistics_of: Callable[..., Any]) -> Callable[[str], Model]:
    """``build(name)``: a tiny llama, sharded or not, or a model of a family, in a folder of ``root``. Each is made once."""
    known: dict[str, Model] = {}

    def build(name: str) -> Model:
        if name not in known:
            folder, dtype = root / name, torch.float32
            if name.startswith("llama"):
                config: Any = llama_config()
                sharded = {"max_shard_size": "40KB"} if name == "llama-sharded" else {}
                dtype = torch.bfloat16 if sharded else torch.float32
            else:
                config, sharded = family_config(name), {}
            save_tiny(folder, config, dtype, **sharded)
            known[name] = Model(folder, statistics_of(folder))
        return known[name]

    return build


def logits(loaded: LoadedModel) -> torch.Tensor:
    """The logits of a few tokens."""
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(input_ids=IDS, use_cache=False).logits.float()
        return found
