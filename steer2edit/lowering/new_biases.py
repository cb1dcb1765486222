"""Biases that a plan creates: the settings of config.json, the new tensors, and the file that holds them.

No shard of the base is written anew: the biases are a further shard, and the index lists it. A base in one file gets an index,
and its file another name, since loaders take ``model.safetensors`` for all there is.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steer2edit.architecture.carriers import BiasSetting
from steer2edit.architecture.config import TEXT_CONFIGS
from steer2edit.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint, TensorInfo, read_json
from steer2edit.errors import TargetError
from steer2edit.lowering.compare import compare_file
from steer2edit.lowering.resolve import Change, Resolved
from steer2edit.lowering.rounding import Rounding, RoundingMeter
from steer2edit.plan import NewBias

CONFIG = "config.json"
_SHARD = "model-new-biases.safetensors"
# what a base in one file becomes, and where the biases go beside it
_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class NewBiases:
    """What creating a plan's biases changes in a checkpoint's folder.

    ``edits`` are the plan's, by name; ``settings`` bring these biases and others, which are zeros. ``renamed`` gives the
    base's shards that get another name.
    """

    checkpoint: Checkpoint
    edits: Mapping[str, NewBias]
    settings: tuple[BiasSetting, ...]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every new bias in its stored dtype. Raises TargetError where a value does not fit it."""
        places = {name: info for setting in self.settings for name, info in setting.creates.items()}
        return {name: self._stored(name, info) for name, info in places.items()}

    def _stored(self, name: str, info: TensorInfo) -> torch.Tensor:
        edit = self.edits.get(name)
        if edit is None:
            return torch.zeros(info.shape, dtype=DTYPES[info.dtype])
        stored = edit.delta.to(DTYPES[info.dtype])
        if not bool(stored.isfinite().all()):
            raise TargetError(f"{name}: the new bias does not fit {info.dtype}; lower the strength")
        return stored

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings of config.json that are switched on."""
        return tuple(key for setting in self.settings for key in setting.keys)

    @property
    def renamed(self) -> dict[str, str]:
        """The base's shards that get another name."""
        return {SINGLE: _FIRST} if self.checkpoint.shards == (SINGLE,) else {}

    @property
    def shard(self) -> str:
        """The file of the new biases."""
        return _SECOND if self.renamed else _SHARD

    @property
    def nbytes(self) -> int:
        """Bytes of the new biases."""
        return sum(info.nbytes for setting in self.settings for info in setting.creates.values())

    def files(self) -> dict[str, dict[str, Any]]:
        """The JSON files that change, with their new content: the config and the index."""
        return {CONFIG: self._config(), self.checkpoint.index or INDEX: self._index()}

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(json.dumps(self.checkpoint.config))
        text = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
        text.update(dict.fromkeys(self.keys, True))
        return config

    def _index(self) -> dict[str, Any]:
        checkpoint = self.checkpoint
        index: dict[str, Any] = {} if checkpoint.index is None else read_json(checkpoint.path / checkpoint.index)
        tensors = checkpoint.tensors.items()
        places = {name: self.renamed.get(info.shard, info.shard) for name, info in tensors}
        size = sum(info.nbytes for _, info in tensors) + self.nbytes
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        index["weight_map"] = {**places, **dict.fromkeys(self.tensors, self.shard)}
        return index

    def write(self, folder: Path) -> None:
        """Write config, index and the new shard into ``folder``, and give the base's shard there its new name."""
        for name, content in self.files().items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        save_file(self.tensors, folder / self.shard, {"format": "pt"})
        for old, new in self.renamed.items():
            (folder / old).rename(folder / new)

    def compare(self, folder: Path) -> tuple[int, list[str]]:
        """How many biases the new shard should hold, and what is wrong with it and with the index.

        The config, and an index that the base has too, are compared with the base's other files.
        """
        problems: list[str] = []
        with tempfile.TemporaryDirectory() as scratch:
            save_file(self.tensors, Path(scratch) / self.shard, {"format": "pt"})
            names = [self.shard]
            if self.checkpoint.index is None:
                (Path(scratch) / INDEX).write_text(json.dumps(self._index()), encoding="utf-8")
                names.append(INDEX)
            for name in names:
                problems += compare_file(Path(scratch) / name, folder / name, name)[1]
        return len(self.tensors), problems

    @property
    def changes(self) -> tuple[Change, ...]:
        """A change for each new tensor, zeros among them."""
        return tuple(
            Change(
                name,
                "NewBias" if name in self.edits else "zeros",
                self.edits[name].norm if name in self.edits else 0.0,
                None,
                hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest(),
            )
            for name, tensor in self.tensors.items()
        )

    @property
    def rounding(self) -> tuple[Rounding, ...]:
        """How much of each planned bias its stored dtype kept."""
        found = []
        for name, edit in self.edits.items():
            meter, stored = RoundingMeter(name), self.tensors[name]
            meter.add(edit, True, 0, torch.zeros_like(stored), stored)
            found.append(meter.result())
        return tuple(found)

    @property
    def details(self) -> dict[str, Any]:
        """For the receipt: the settings, the file, how many biases it holds, and how many of them are zeros."""
        return {
            "settings": list(self.keys),
            "file": self.shard,
            "biases": len(self.tensors),
            "zeros": len(self.tensors) - len(self.edits),
        }

    def artefact(self, folder: Path) -> Checkpoint:
        """The base's tensors where they lie in the artefact."""
        places = {
            name: replace(info, shard=self.renamed.get(info.shard, info.shard))
            for name, info in self.checkpoint.tensors.items()
        }
        return replace(self.checkpoint, path=folder, tensors=places)


def new_biases(resolved: Resolved) -> NewBiases | None:
    """What creating a plan's biases changes; None where it creates none. Raises TargetError where the files do not allow it."""
    edits = {name: edit for name, (edit, _) in resolved.edits.items() if isinstance(edit, NewBias)}
    if not edits:
        return None
    checkpoint = resolved.checkpoint
    if checkpoint.config.get("transformers_weights") is not None:
        raise TargetError(
            f"{checkpoint.name} names its weights itself (transformers_weights in config.json): new biases need a file of "
            f"their own. Call its weights {SINGLE}, take the setting out, and make the plan anew."
        )
    settings = tuple(setting for setting in resolved.spec.bias_settings if setting.creates.keys() & edits.keys())
    found = NewBiases(checkpoint, edits, settings)
    if (checkpoint.path / found.shard).exists():
        raise TargetError(f"{checkpoint.path} holds a file {found.shard}, which new biases would take; rename it")
    return found


def stored_bias(resolved: Resolved, edit: NewBias) -> NewBias:
    """The new bias as its stored dtype holds it."""
    return replace(edit, delta=edit.delta.to(DTYPES[dtype_of(resolved, edit.tensor)]).float())


def dtype_of(resolved: Resolved, name: str) -> str:
    """The stored dtype of an edited tensor, or of a bias to create."""
    for setting in resolved.spec.bias_settings:
        if name in setting.creates:
            return setting.creates[name].dtype
    return resolved.edits[name][1].locate(resolved.checkpoint, name).dtype
