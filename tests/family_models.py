"""Tiny models of every family on disk, as the compiler sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import ModelSpec, Site, read_spec
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import LoadedModel, load_weights
from steer2edit.scoring.scores import Scoring

# same length, same last token
CONTEXTS = torch.tensor([[1, 5, 9, 44, 7, 20], [1, 60, 33, 12, 51, 20]])


class Case:
    """A tiny model on disk, as the compiler sees it."""

    def __init__(self, folder: Path, statistics_of: Callable[..., Any]) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.spec: ModelSpec = read_spec(self.checkpoint)
        self._statistics_of = statistics_of
        self._statistics: Any = None

    def plan(self, method: str) -> EditPlan:
        if self._statistics is None:
            self._statistics = self._statistics_of(self.folder)
        return make_plan(Scoring(self.checkpoint, self.spec, self._statistics), method=method)

    def loaded(self, folder: Path | None = None) -> LoadedModel:
        return LoadedModel(load_weights(folder or self.folder), None, self.spec)

    def matrix(self, site: Site) -> torch.Tensor:
        stored = self.checkpoint.read(site.locate(self.checkpoint))
        return stored if site.orientation == "out_in" else stored.T


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return folder


def blocks(loaded: LoadedModel) -> list[Any]:
    return [loaded.model.get_submodule(f"{loaded.spec.block_modules}{i}") for i in range(loaded.spec.layers)]


def last_logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model(input_ids=CONTEXTS, use_cache=False).logits[:, -1]
        return logits
