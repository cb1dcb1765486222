"""Open a checkpoint: a folder or a Hub id becomes a Checkpoint.

All faults of its files are named in one error.

Only headers are read.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from steer2edit.checkpoint.header import TensorInfo, read_header
from steer2edit.checkpoint.json_file import read_json
from steer2edit.checkpoint.quantised import plain_view
from steer2edit.checkpoint.reader import Checkpoint, stamp
from steer2edit.checkpoint.weight_files import INDEX, SINGLE, WeightFiles, choose_weights, other_set
from steer2edit.errors import CheckpointError, HubError, listing
from steer2edit.files.hub import read_reference, snapshot
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.files.stand_ins import stand_in
from steer2edit.files.untrusted import special_files
from steer2edit.notices import notice

# weights in other formats, which a safetensors compile neither reads nor passes on
_HUB_IGNORE = ["*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", "original/*", "onnx/*"]
# files beside the weights that loading reads
_READ_BESIDE = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken"})
_NAMED = 50  # tensors named in one error
_DEPTH, _FOLDERS = 3, 500  # how far models are looked for in a folder that is none


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a Hub id ``user/name`` or ``user/name@revision`` (fetched through huggingface_hub into its cache).

    Matrices that are quantised in a format that is read have the names and shapes of the unquantised ones.
    Where a folder holds several sets of weights, the one that transformers loads is opened, and a notice names the others.
    Raises CheckpointError naming every problem: missing files, an index that contradicts its shards, damaged headers, files
    in whose place a Git LFS pointer or a web page lies.
    """
    path, name, commit = _locate(model, revision)
    try:
        _check_folder(path)
        config = read_json(path / "config.json")
        files = choose_weights(path, config)
        stand_ins = [problem for entry in sorted(path.iterdir()) if (problem := _stand_in(entry))]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    tensors, stamps, problems = _read_shards(path, files)
    if problems := [*stand_ins, *problems]:
        raise CheckpointError(f"{path} is not a sound checkpoint:\n{listing(problems, _NAMED)}")
    if others := other_set(files):
        notice(
            f"{path} holds more than one set of weights: {files.shards[0] if files.index is None else files.index} is used, as "
            f"transformers does; neither read nor copied: {', '.join(others[:6])}{' …' * (len(others) > 6)}"
        )
    checkpoint = Checkpoint(
        path=path,
        name=name,
        revision=commit,
        config=config,
        tensors=tensors,
        shards=files.shards,
        from_hub=commit is not None,
        stamps=stamps,
        index=files.index,
        other_weights=files.others,
    )
    return plain_view(checkpoint)


def _locate(model: str | Path, revision: str | None) -> tuple[Path, str, str | None]:
    """The folder, the model's name, and the commit where it is from the Hub."""
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):  # false for names that no file system takes, which no repository has either
        if revision is not None:
            raise CheckpointError(f"--revision {revision} was given, but {path} is a local folder")
        return path, path.resolve().name, None
    reference = read_reference(model, revision)
    if reference is None:
        raise CheckpointError(
            f"{_brief(model)} does not exist (and is not of the form of a Hub id, user/name or user/name@revision)"
        )
    try:
        folder = snapshot(reference, ignore=_HUB_IGNORE)
    except HubError as error:
        raise CheckpointError(
            f"{_brief(model)} is neither a folder here nor could be fetched from the Hub: {error}"
        ) from None
    return folder, reference.repository, folder.name


def _brief(model: str | Path) -> str:
    text = str(model)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _check_folder(path: Path) -> None:
    """Refuse what is not a model's folder. Raises CheckpointError, and OSError where it cannot be listed."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a checkpoint folder (config.json and *.safetensors)")
    if special := special_files(path):
        raise CheckpointError(
            f"{path} holds what is neither file nor folder; take it out:\n{listing(map(repr, special))}"
        )
    if not os.path.lexists(path / "config.json") and (models := _models_inside(path)):
        raise CheckpointError(
            f"{path} does not hold config.json, so it is not a model's folder; it contains models, so name one of them:\n"
            f"{listing(models)}"
        )
    if os.path.lexists(path / ADAPTER_CONFIG) and any((path / name).is_file() for name in (SINGLE, INDEX)):
        raise CheckpointError(
            f"{path} holds {ADAPTER_CONFIG} beside a model: transformers would load that adapter's base in its place; take it out"
        )


def _models_inside(path: Path) -> list[str]:
    """Folders in a folder, to a small depth, that hold a config.json: the snapshots of a Hub cache, say."""
    models = []
    for seen, (folder, folders, files) in enumerate(os.walk(path)):
        depth = len(Path(folder).relative_to(path).parts)
        if "config.json" in files:
            models.append(folder)
        if depth >= _DEPTH or seen > _FOLDERS:
            folders.clear()
        folders.sort()
    return models


def _stand_in(entry: Path) -> str | None:
    if entry.name == "config.json" or entry.suffix not in _READ_BESIDE or not entry.is_file():
        return None
    problem = stand_in(entry)
    # a text file may be a page: a template, say
    return problem if problem is None or entry.suffix in (".json", ".model") or "LFS" in problem else None


def _read_shards(path: Path, files: WeightFiles) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, ...]], list[str]]:
    """The tensors of a set of weights, each shard's stamp, and every contradiction."""
    tensors: dict[str, TensorInfo] = {}
    stamps: dict[str, tuple[int, ...]] = {}
    problems, again = [], []
    for shard in files.shards:
        # before its header: whatever is written from here on is noticed
        with suppress(OSError, ValueError):
            stamps[shard] = stamp(path / shard)
        try:
            infos = read_header(path / shard)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for info in infos:
            if info.name in tensors:
                first = tensors[info.name].shard
                again.append(f"{info.name!r} is in two shards, {first} and {shard}: engines differ in which they load")
            else:
                tensors[info.name] = info
    if problems or again or files.weight_map is None:
        return tensors, stamps, problems + again
    for tensor, shard in files.weight_map.items():
        if tensor not in tensors or tensors[tensor].shard != shard:
            problems.append(f"{files.index} places {tensor!r} in {shard}, which does not hold it")
    problems += [
        f"{files.index} does not name {info.name!r}, which {info.shard} holds; engines differ in whether they load it"
        for info in tensors.values()
        if info.name not in files.weight_map
    ]
    return tensors, stamps, problems
