"""The checkpoint target: the base's folder again, with only the edited tensors' bytes different.

Same shards, names, order, dtypes and metadata; biases that the plan creates are a shard more. Byte ranges between edited
tensors are copied by the kernel; an edited tensor is read, summed in float32, rounded once and written, block by block; one
in fp8 is quantised again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from steer2edit.architecture import Site
from steer2edit.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo, choose_weights, read_json
from steer2edit.checkpoint.fp8 import FP8
from steer2edit.errors import CheckpointError
from steer2edit.lowering import Comparison, HubEntry, Lowering, Place, Resolved, Snippet, WholeModel, Writing
from steer2edit.lowering.new_biases import NewBiases, dtype_of, new_biases
from steer2edit.lowering.other_files import compare_other_files, copy_other_files, left_out_files
from steer2edit.lowering.rewrite import Rewritten, copies, places_of, rewrite
from steer2edit.notices import notice
from steer2edit.plan import Edit
from steer2edit.progress import Progress
from steer2edit.targets import _pruned
from steer2edit.targets._bias_engines import remarks as bias_engine_remarks
from steer2edit.targets._compare_shards import compare_shards

SUMMARY = "The whole model with edited weights, for transformers, vLLM and everything that reads the base."
HUB = HubEntry(
    "A checkpoint with a steering vector compiled into its weights by steer2edit: no training, no hooks, no changed "
    "architecture.",
    "finetune",
    "transformers",
)
WHOLE_MODEL = True
STRUCTURE = True

# what loading needs beside the shards; other files of the base's folder may be anybody's notes
_NEEDED = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "image_processor_config.json", "hf_quant_config.json"),
    *("tokenizer.json", "tokenizer.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt", "params.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "normalizer.json"),
    *("spiece.model", "sentencepiece*.model", "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *("processing_*.py", "image_processing_*.py", "video_processing_*.py", "feature_extraction_*.py"),
)
_NEEDED_FOLDERS = ("additional_chat_templates/*.jinja", "chat_templates/*.jinja")
_LICENCE = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)([-_.][\w.-]+)?", re.ASCII)
_LICENCE_SUFFIXES = frozenset(["", ".txt", ".md", ".rst", ".pdf", ".html"])


def check(resolved: Resolved) -> None:
    """Raise TargetError where there is no place for new biases, and PlanError for parts that cannot be removed."""
    new_biases(resolved)
    if resolved.plan.structure:
        _pruned.check(resolved)


def lower(resolved: Resolved, folder: Path, writing: Writing, progress: Progress) -> Lowering:
    """Write the edited checkpoint into ``folder``. Raises TargetError where a value does not fit the stored dtype."""
    check(resolved)
    checkpoint, edits, created = resolved.checkpoint, resolved.rewritten, new_biases(resolved)
    places = {name: places_of(checkpoint, *one) for name, one in edits.items()}
    copy_other_files(checkpoint, folder)
    if resolved.plan.structure.removes:
        return _pruned.lower_pruned(resolved, folder, progress, writing)
    if resolved.plan.structure:
        _pruned.write_config(resolved, folder)
    sizes = _sizes(checkpoint)
    edited = {info.shard for infos in places.values() for info in infos}
    linked = [shard for shard in sizes if writing.link and shard not in edited and _link(checkpoint, shard, folder)]
    rewritten: list[Rewritten] = []
    total = sum(size for shard, size in sizes.items() if shard not in linked)
    with progress("write checkpoint", total=total) as advance, ThreadPoolExecutor(writing.workers) as pool:
        # in the order of the files' bytes, so that however many jobs run, a disk reads and writes nearly in sequence
        jobs = [
            job
            for shard in sizes
            if shard not in linked
            for job in _shard_jobs(checkpoint, edits, places, shard, folder)
        ]
        for result in pool.map(lambda job: job(), jobs):
            if isinstance(result, Rewritten):
                rewritten.append(result)
            advance(result.nbytes if isinstance(result, Rewritten) else result)
    if created is not None:
        created.write(folder)
        for remark in _bias_notes(resolved, created)[1:]:
            notice(remark)
    checkpoint.check_unchanged()
    lowering = _lowering(resolved, rewritten, created)
    notes = list(lowering.notes)
    if linked:
        notes.append(
            f"{len(linked)} of {len(sizes)} shards are hard links to the base's files: whoever writes into one of them in place "
            "changes both; copying the folder ends that"
        )
    return Lowering(lowering.exactness, lowering.changes, tuple(notes), {**lowering.details, "linked": linked})


def verify(resolved: Resolved, folder: Path, progress: Progress) -> Comparison:
    """Compare every shard and every other file of ``folder`` with what base and plan give."""
    checkpoint, structure, created = resolved.checkpoint, resolved.plan.structure, new_biases(resolved)
    shards = set(checkpoint.shards)
    rewritten_files: dict[str, Mapping[str, Any]] = _pruned.rewritten_files(resolved) if structure else {}
    if created is not None:
        shards = {*(created.renamed.get(shard, shard) for shard in shards), created.shard}
        rewritten_files |= created.files()
    others = compare_other_files(
        checkpoint, folder, rewritten_files, lambda name: _needed(name, {*shards, checkpoint.index or SINGLE})
    )
    files = frozenset({*shards, *others.files, *rewritten_files})
    if structure.removes:
        tensors, pruned, wrong = _pruned.compare_pruned(resolved, folder, progress)
        return Comparison(tensors, files, pruned, (*wrong, *others.problems), (), others.notes)
    result = compare_shards(resolved, folder, progress, created)
    problems = [*result.problems, *others.problems]
    tensors, rounding = result.tensors, tuple(result.rounding)
    if created is not None:
        count, wrong = created.compare(folder)
        tensors, problems, rounding = tensors + count, [*problems, *wrong], (*rounding, *created.rounding)
    lowering = _lowering(resolved, result.rewritten, created)
    return Comparison(tensors, files, lowering, tuple(problems), rounding, others.notes)


def loadable(resolved: Resolved, folder: Path) -> WholeModel:
    """The folder is a model."""
    return WholeModel(folder)


def load_snippet(place: Place) -> Snippet:
    """By transformers, without the base."""
    lines = (
        f"from transformers import {place.auto_class}",
        f"model = {place.auto_class}.from_pretrained({place.quoted})",
    )
    return Snippet("python", lines)


def loading_files(folder: Path, names: Sequence[str]) -> set[str]:
    """The shards, configs, tokenizer, templates, code and licence: what the base's makers meant for loading."""
    try:
        weights = choose_weights(folder, read_json(folder / "config.json"))
        shards = {name for name in (weights.index, *weights.shards) if name}
    except CheckpointError:  # a folder that is not whole: what its receipt lists of these is asked for
        shards = {SINGLE, INDEX}
    return {name for name in names if _needed(name, shards)}


def _needed(name: str, shards: set[str]) -> bool:
    if name in shards or any(fnmatchcase(name, pattern) for pattern in _NEEDED_FOLDERS):
        return True
    if "/" in name:
        return False
    suffix = PurePosixPath(name).suffix.lower()
    # LICENSE-2.0 has no suffix, LICENSE-KEYS.pem has one
    plain = suffix in _LICENCE_SUFFIXES or suffix[1:].isdecimal()
    return any(fnmatchcase(name, pattern) for pattern in _NEEDED) or bool(plain and _LICENCE.fullmatch(name))


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    return {shard: (checkpoint.path / shard).stat().st_size for shard in checkpoint.shards}


def _lowering(resolved: Resolved, rewritten: Sequence[Rewritten], created: NewBiases | None) -> Lowering:
    """What is said of an edited checkpoint. It follows from base and plan alone."""
    checkpoint, frozen = resolved.checkpoint, resolved.spec.frozen
    notes = [f"left out {name}: another copy of the unedited weights" for name in left_out_files(checkpoint)]
    if frozen:
        notes.append(f"left as in the base: {len(frozen)} quantised expert tensors, such as {frozen[0]}")
    sizes = _sizes(checkpoint)
    requantised = [result.requantised for result in rewritten if result.requantised]
    details: dict[str, Any] = {
        "shards": len(sizes),
        "bytes": sum(sizes.values()),
        **({"requantised": requantised} if requantised else {}),
    }
    dtypes = sorted({dtype_of(resolved, name) for name in resolved.edits})
    changes = tuple(change for result in rewritten for change in result.changes)
    if created is not None:
        changes += created.changes
        details |= {"bytes": details["bytes"] + created.nbytes, "created": created.details}
        notes += _bias_notes(resolved, created)
    return Lowering(_exactness(dtypes), changes, tuple(notes), details)


def _bias_notes(resolved: Resolved, created: NewBiases) -> list[str]:
    """What a receipt says of the new biases: where they lie, and which engines do not run them."""
    zeros, keys = len(created.tensors) - len(created.edits), ", ".join(created.keys)
    told = f"{created.shard} holds {len(created.edits)} new biases, and {zeros} of zeros that come with them: {keys}"
    roles = {resolved.spec.owners[name].role for name in created.edits}
    return [told, *bias_engine_remarks(resolved.spec.model_type, roles)]


def _exactness(dtypes: Sequence[str]) -> str:
    rounded = [dtype for dtype in dtypes if dtype != FP8]
    parts = [f"exact up to one rounding to {', '.join(rounded)}"] if rounded else []
    if FP8 in dtypes:
        parts.append("approximate in fp8, with the error of each matrix in the receipt (details.requantised)")
    return "; ".join(parts) or "exact"


def _shard_jobs(
    checkpoint: Checkpoint,
    edits: Mapping[str, tuple[Edit, Site]],
    places: Mapping[str, Sequence[TensorInfo]],
    shard: str,
    folder: Path,
) -> Iterator[Callable[[], Rewritten | int]]:
    """The work of one shard, in the order of its bytes. The file exists, in its full size, before the first job."""
    source, target = checkpoint.path / shard, folder / shard
    size = source.stat().st_size
    # exclusive: nothing is ever opened for writing here that was not made here, least of all a link
    with open(target, "xb") as file:
        file.truncate(size)
    here = [(info, name, i) for name, infos in places.items() for i, info in enumerate(infos) if info.shard == shard]
    end = 0
    for info, name, i in sorted(here, key=lambda entry: entry[0].offset):
        yield from copies(source, target, end, info.offset)
        if i == 0:  # scales are written with their matrix, wherever they lie
            yield lambda name=name: rewrite(checkpoint, *edits[name], places[name], folder)  # type: ignore[misc]
        end = info.offset + info.nbytes
    yield from copies(source, target, end, size)


def _link(checkpoint: Checkpoint, shard: str, folder: Path) -> bool:
    """Whether the shard could be linked.

    A link to a link would point out of the folder, so the file itself is linked.
    """
    try:
        os.link(os.path.realpath(checkpoint.path / shard), folder / shard)
    except OSError as error:  # another file system, or one without hard links
        notice(f"unedited shards are copied: they cannot be linked into {folder.parent} ({error.strerror})")
        return False
    return True
