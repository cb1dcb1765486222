"""Which files of a folder hold the model's weights: one set is chosen as transformers chooses, all others are named.

The order is transformers': the file that ``transformers_weights`` in config.json names, else ``model.safetensors``, else the
shards of ``model.safetensors.index.json``. Other engines may prefer another set, so the others never reach an artefact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.checkpoint.header import read_header
from steer2edit.checkpoint.json_file import read_json
from steer2edit.errors import CheckpointError, listing, shown
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.files.stand_ins import read_failure

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# suffixes of weights that are not in safetensors
_OTHER_FORMATS = frozenset({".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack", ".onnx", ".ckpt"})


@dataclass(frozen=True)
class WeightFiles:
    """A folder's weights: the chosen ``shards``, the ``index`` file that belongs to them, and what it says.

    ``weight_map`` is tensor → shard, or None where the weights are one file. ``others`` are the folder's other safetensors
    files and indexes, which are neither read nor copied.
    """

    shards: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    others: tuple[str, ...] = ()


def choose_weights(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The set of weights that transformers loads from ``folder``.

    Raises CheckpointError where there is none, or where config.json or the index names files that are not there to read.
    """
    chosen = config.get("transformers_weights")
    if chosen is None:
        chosen = SINGLE if (folder / SINGLE).is_file() else INDEX
        if not (folder / chosen).is_file():
            raise CheckpointError(_no_weights(folder))
    elif not _is_plain(chosen) or not chosen.endswith((".safetensors", _INDEX_SUFFIX)):
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers_weights is {shown(chosen)}; expected the name of a *.safetensors file or a "
            f"*{_INDEX_SUFFIX} file in the folder"
        )
    if chosen.endswith(_INDEX_SUFFIX):
        weight_map = read_weight_map(folder / chosen)
        shards, index = tuple(dict.fromkeys(weight_map.values())), chosen
        return WeightFiles(shards, index, weight_map, _others(folder, {*shards, index}))
    index = INDEX if chosen == SINGLE and _describes_single(folder) else None
    return WeightFiles((chosen,), index, None, _others(folder, {chosen, index or chosen}))


def read_weight_map(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor → shard. Raises CheckpointError where it is missing or names other folders."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    bad = sorted({shown(file) for file in weight_map.values() if not _is_plain(file)})
    if bad:
        raise CheckpointError(f"{path} names files outside the folder:\n{listing(bad)}\nexpected plain file names")
    return weight_map


def other_set(files: WeightFiles) -> tuple[str, ...]:
    """Those of the files that were not chosen which an engine may load in place of the chosen ones."""
    return tuple(name for name in files.others if name in (SINGLE, INDEX) or _SHARD.fullmatch(name))


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _describes_single(folder: Path) -> bool:
    """Whether the index beside ``model.safetensors`` places exactly that file's tensors in it."""
    if not (folder / INDEX).is_file():
        return False
    try:
        weight_map = read_weight_map(folder / INDEX)
        return set(weight_map.values()) == {SINGLE} and weight_map.keys() == {
            info.name for info in read_header(folder / SINGLE)
        }
    except CheckpointError:  # an index that is not used may be damaged
        return False


def _others(folder: Path, chosen: set[str]) -> tuple[str, ...]:
    names = os.listdir(folder)
    return tuple(sorted(n for n in names if n.endswith((".safetensors", _INDEX_SUFFIX)) and n not in chosen))


def _no_weights(folder: Path) -> str:
    """Why a folder without ``model.safetensors`` and without its index cannot be opened, and what to do."""
    for name in (SINGLE, INDEX):
        if (folder / name).is_symlink():
            return f"cannot read {folder / name}: {read_failure(folder / name, FileNotFoundError())}"
    start = f"{folder} holds neither {SINGLE} nor {INDEX}"
    if (folder / ADAPTER_CONFIG).exists():
        return f"{start} (this is a PEFT adapter: name its base model instead)"
    names = sorted(os.listdir(folder))
    stored = [name for name in names if name.endswith(".safetensors")]
    parts = [name for name in stored if _SHARD.fullmatch(name)]
    if len(parts) > 1:
        return (
            f"{folder} holds shards without their index: {', '.join(parts[:4])}{' …' * (len(parts) > 4)} are there, {INDEX} is "
            "missing; put the index there, which is published beside the shards"
        )
    if len(stored) == 1 and not stored[0].startswith("consolidated"):
        return f"{start} (found {stored[0]}); if that file holds all of the model's weights, rename it to {SINGLE}"
    others = [name for name in names if name in stored or Path(name).suffix in _OTHER_FORMATS]
    hint = f" (found {', '.join(others[:4])})" if others else ""
    return f"{start}{hint}; other formats are converted with transformers' save_pretrained"
