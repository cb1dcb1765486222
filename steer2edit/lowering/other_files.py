"""The files of a checkpoint's folder that are not its weights: which are copied, and which are left out."""

from __future__ import annotations

import shutil
from pathlib import Path

from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError, listing
from steer2edit.files.layout import RECEIPT

# other copies of the weights: they would be unedited, and some engines prefer them
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy every file that is not an indexed shard, byte for byte; the names of those left out."""
    for source in copied_files(checkpoint):
        name = source.relative_to(checkpoint.path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return [str(path.relative_to(checkpoint.path)) for path in _other_files(checkpoint) if _other_weights(path)]


def copied_files(checkpoint: Checkpoint) -> list[Path]:
    """The files beside the shards that an artefact has too: all but other copies of the weights.

    Raises TargetError for links to anywhere but where the weights lie: a stranger's link may lead to the reader's own files,
    which the artefact would make public.
    """
    found = [path for path in _other_files(checkpoint) if not _other_weights(path)]
    home = checkpoint.path.resolve()
    # a folder of links, such as the Hub's cache, has all of its files in one place
    places = {(checkpoint.path / shard).resolve().parent for shard in checkpoint.shards} | {home}
    astray = [
        f"{path.relative_to(checkpoint.path)} -> {path.resolve()}"
        for path in found
        if path.is_symlink() and path.resolve().parent not in places and not path.resolve().is_relative_to(home)
    ]
    if astray:
        raise TargetError(
            f"{checkpoint.path} holds links to files elsewhere, which are not copied into an artefact:\n{listing(astray)}\n"
            "Put the files themselves in their place, or take the links out."
        )
    return found


def _other_files(checkpoint: Checkpoint) -> list[Path]:
    found = []
    for source in sorted(checkpoint.path.rglob("*")):
        name = source.relative_to(checkpoint.path)
        if not source.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if str(name) in checkpoint.shards or str(name) in {RECEIPT, "README.md"} or name.parts[0] == "steer2edit":
            continue
        found.append(source)
    return found


def _other_weights(path: Path) -> bool:
    return path.suffix in _OTHER_WEIGHTS or path.match("consolidated*.safetensors")
