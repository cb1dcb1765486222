"""The files of a checkpoint's folder that are not its weights: which are copied, and which are left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.checkpoint import Checkpoint, read_json
from steer2edit.errors import CheckpointError, TargetError, first_line, listing, shown
from steer2edit.files.layout import ADAPTER_CONFIG, CARD, RECEIPT
from steer2edit.files.outputs import is_own_file
from steer2edit.lowering.compare import same_file

# other copies of the weights: they would be unedited, and some engines prefer them
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")

# files by which a folder is known as the output of this program, of a training, or of PEFT
_OUTPUTS = (
    RECEIPT,
    "study.json",
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    ADAPTER_CONFIG,
)


@dataclass(frozen=True)
class OtherFiles:
    """How an artefact's files beside its shards compare: the names that belong there, what is wrong, and remarks."""

    files: frozenset[str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy every file that is not an indexed shard, byte for byte; the names of those left out."""
    for source in copied_files(checkpoint):
        name = source.relative_to(checkpoint.path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return left_out_files(checkpoint)


def left_out_files(checkpoint: Checkpoint) -> list[str]:
    """The names of other copies of the weights, which an artefact does not get."""
    left_out = [path for path in _other_files(checkpoint) if _other_weights(checkpoint, path)]
    return [path.relative_to(checkpoint.path).as_posix() for path in left_out]


def compare_other_files(
    checkpoint: Checkpoint, folder: Path, rewritten: Mapping[str, Mapping[str, Any]], needed: Callable[[str], bool]
) -> OtherFiles:
    """Compare the artefact's files beside the shards with the base's.

    ``rewritten`` are JSON files that the plan changes, with their new content. A missing file is a problem if loading
    ``needed`` it, else a remark: a published artefact lacks what loading does not need.
    """
    names: list[str] = []
    problems: list[str] = []
    notes: list[str] = []
    for source in copied_files(checkpoint):
        name = source.relative_to(checkpoint.path).as_posix()
        names.append(name)
        ours = folder / name
        try:
            if not ours.is_file():
                (problems if needed(name) else notes).append(f"{name} is missing; the base has it")
            elif name in rewritten:
                if read_json(ours) != rewritten[name]:
                    problems.append(f"{name} is not the base's with the plan's changes")
            elif not same_file(source, ours):
                problems.append(f"{name} differs from the base's{_keys(source, ours)}")
        except (OSError, CheckpointError) as error:
            problems.append(f"{name} cannot be compared: {first_line(error)}")
    return OtherFiles(frozenset(names), tuple(problems), tuple(notes))


def _keys(source: Path, ours: Path) -> str:
    """In which keys two JSON files differ; "" for other files."""
    if source.suffix != ".json":
        return ""
    expected, value = read_json(source), read_json(ours)
    keys = [key for key in dict.fromkeys([*expected, *value]) if expected.get(key) != value.get(key)]
    return f" in {', '.join(map(shown, keys[:4]))}{' …' if len(keys) > 4 else ''}" if keys else " in its layout"


def copied_files(checkpoint: Checkpoint) -> list[Path]:
    """The files beside the shards that an artefact has too: all but other copies of the weights.

    Raises TargetError for links to anywhere but where the weights lie: a stranger's link may lead to the reader's own files,
    which the artefact would make public.
    """
    files = [path for path in _other_files(checkpoint) if not _other_weights(checkpoint, path)]
    refuse_links(checkpoint, files)
    return files


def refuse_links(checkpoint: Checkpoint, files: Sequence[Path]) -> None:
    """Raise TargetError where one of a checkpoint's files is a link that leads out of the checkpoint."""
    home = checkpoint.path.resolve()
    # a folder of links, such as the Hub's cache, has all of its files in one place
    places = {(checkpoint.path / shard).resolve().parent for shard in checkpoint.shards} | {home}
    astray = [
        f"{path.relative_to(checkpoint.path)} -> {path.resolve()}"
        for path in files
        if path.is_symlink() and path.resolve().parent not in places and not path.resolve().is_relative_to(home)
    ]
    if astray:
        raise TargetError(
            f"{checkpoint.path} holds links to files elsewhere, which are not copied into an artefact:\n{listing(astray)}\n"
            "Put the files themselves in their place, or take the links out."
        )


def _other_files(checkpoint: Checkpoint) -> list[Path]:
    files = []
    strange: set[Path] = set()
    # sorted: a folder comes before what lies in it
    for source in sorted(checkpoint.path.rglob("*")):
        name = source.relative_to(checkpoint.path)
        if source.is_dir() and not source.is_symlink() and _is_output(source):
            strange.add(source)
        if not source.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if strange & set(source.parents) or (source.suffix == ".safetensors" and is_own_file(source)):
            continue
        if str(name) in checkpoint.shards or str(name) in {RECEIPT, CARD} or name.parts[0] == "steer2edit":
            continue
        files.append(source)
    return files


def _is_output(folder: Path) -> bool:
    """Whether a folder inside a base is the output of a program.

    Such outputs are an artefact, a study, a training's checkpoint, or an adapter.
    """
    return any((folder / name).is_file() for name in _OUTPUTS)


def _other_weights(checkpoint: Checkpoint, path: Path) -> bool:
    if path.suffix in _OTHER_WEIGHTS or path.match("consolidated*.safetensors"):
        return True
    return path.parent == checkpoint.path and path.name in checkpoint.other_weights
