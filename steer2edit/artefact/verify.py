"""Prove that an artefact is what its plan says: by bytes, then by numbers.

Bytes: everything is recomputed from base and plan, and each tensor of the artefact is compared. Numbers: logits of the
base with the plan applied by hooks are compared with those of the artefact, loaded as its users load it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steer2edit import targets
from steer2edit.architecture import ModelSpec, Site, read_spec
from steer2edit.artefact.receipt import read_receipt
from steer2edit.checkpoint import Checkpoint, TensorInfo, open_checkpoint, part_name, read_header, read_json
from steer2edit.checkpoint.fp8 import SUFFIX, block_bytes, scales_of
from steer2edit.checkpoint.gguf import read_control_vector, read_gguf
from steer2edit.errors import CheckpointError, PlanError
from steer2edit.experts.checking import check_masks
from steer2edit.files.atomic import load_tensors
from steer2edit.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PLAN
from steer2edit.lowering import located, resolve
from steer2edit.lowering.pruning import assembled, changed_config
from steer2edit.lowering.rewrite import edited_blocks
from steer2edit.lowering.rounding import Rounding, RoundingMeter
from steer2edit.plan import Edit, EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.hooks import edited, stream_shifted
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights, with_adapter
from steer2edit.targets import gguf, gguf_vector
from steer2edit.targets._pruned import compare_pruned

TOLERANCE = 1e-4
_GGUF_TARGETS = ("gguf", "gguf-vector")
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Water boils at a lower temperature on a mountain because",
    "List three uses of a paper clip:",
    "Once upon a time, in a village by the sea, there lived",
)


@dataclass(frozen=True)
class Verification:
    """The result: ``ok`` is whether every check passed, ``problems`` name each that did not."""

    target: str
    tensors: int
    problems: tuple[str, ...]
    rounding: tuple[Rounding, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    numbers: bool = True,
    runtime: Runtime = Runtime(dtype="float32"),  # noqa: B008
    progress: Progress = silent,
) -> Verification:
    """Check the artefact in ``folder`` against its base (found by its receipt's name unless given).

    Raises PlanError or CheckpointError where there is nothing to compare: no receipt, a damaged plan, another base.
    """
    folder = Path(folder)
    receipt = read_receipt(folder)
    plan = EditPlan.load(folder / PLAN)
    problems = []
    if plan.hash != receipt["plan"]["sha256"]:
        problems.append(
            f"{PLAN} is not the plan of the receipt: SHA-256 {plan.hash[:12]}, expected {receipt['plan']['sha256'][:12]}"
        )
    checkpoint = _open_base(plan, base)
    spec = read_spec(checkpoint)
    resolve(plan, checkpoint, spec)
    target = str(receipt["target"])
    if target in _GGUF_TARGETS:
        result = _compare_gguf(folder, target, plan, checkpoint, spec, progress)
    else:
        compare = {"lora": _compare_adapter, "checkpoint": _compare_checkpoint}.get(target)
        if compare is None:
            raise PlanError(f"{folder} was written by the target {target!r}, which verify does not know how to read")
        result = compare(folder, plan, checkpoint, spec, progress)
    result = replace(result, problems=(*problems, *result.problems))
    if numbers and result.ok:
        found, wrong = compare_numbers(folder, target, plan, checkpoint, spec, runtime, progress)
        result = replace(result, numbers=found, problems=wrong)
    return result


def compare_numbers(
    folder: Path,
    target: str,
    plan: EditPlan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    runtime: Runtime,
    progress: Progress = silent,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Largest differences between the logits of base + hooks and those of the artefact, on probe prompts; problems.

    GGUF files are read back and applied by hooks: this shows what they hold, not what an engine makes of it.
    """
    with progress("compare logits", total=3) as advance:
        loaded = load_model(checkpoint, spec, runtime)
        base = _logits(loaded)
        advance(1)
        hooked = _logits(loaded, lambda: edited(loaded, plan))
        advance(1)
        model = load_weights(folder, runtime) if target == "checkpoint" else None
        artefact = _artefact_logits(loaded, folder, target, plan, model)
        advance(1)
    stored = {located(checkpoint, edit, spec.owners[edit.tensor]).dtype for edit in plan.edits}
    rounds = target == "gguf-vector" or (target == "checkpoint" and stored - {"F32", "F64"})
    largest = max(float(logits.abs().max()) for logits in hooked)
    effect, difference = _difference(base, hooked), _difference(hooked, artefact)
    found: dict[str, Any] = {
        "effect": effect,
        "difference": difference,
        "largest_logit": largest,
        "tolerance": None if rounds else TOLERANCE,
        "stored": sorted(stored),
    }
    problems = []
    if target == "checkpoint" and plan.method.get("name") == "experts":
        masked = replace(loaded, model=model, spec=read_spec(open_checkpoint(folder)))
        found["experts"], wrong = check_masks(loaded, masked, plan, TOLERANCE)
        problems += wrong
    if not rounds and not difference <= TOLERANCE:
        problems.append(f"logits differ from base + plan by {difference:.3g}, more than {TOLERANCE:g}")
    if target == "gguf-vector":
        # a constant push may well miss the plan by more than the plan moves; it has to move the model at all
        if plan.edits and not _difference(base, artefact) > TOLERANCE:
            problems.append("the logits under the control vector are the base's: it does not act")
    elif plan.edits and difference >= max(effect, TOLERANCE):
        problems.append(
            f"the artefact is as far from base + plan ({difference:.3g}) as the base itself ({effect:.3g}): it does not act"
        )
    return found, tuple(problems)


def _open_base(plan: EditPlan, base: str | Path | None) -> Checkpoint:
    if base is not None:
        return open_checkpoint(base)
    if plan.base.revision is None and not Path(plan.base.name).exists():
        raise PlanError(f"the base was a local folder, {plan.base.name}, and is not here; name it with --base")
    return open_checkpoint(plan.base.name, plan.base.revision)


def _compare_checkpoint(
    folder: Path, plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, progress: Progress
) -> Verification:
    edits = resolve(plan, checkpoint, spec)
    if plan.structure:
        config = read_json(folder / "config.json")
        if config != changed_config(checkpoint.config, plan.structure):
            return Verification("checkpoint", 0, ("config.json is not the base's with the plan's numbers of experts",))
    if plan.structure.remove:
        shards = assembled(checkpoint, spec, plan.structure, edits)
        tensors, wrong = compare_pruned(checkpoint, open_checkpoint(folder), shards, progress)
        return Verification("checkpoint", tensors, tuple(wrong))
    problems, roundings = [], []
    ours: dict[str, TensorInfo] = {}
    for shard in checkpoint.shards:
        try:
            ours |= {info.name: info for info in read_header(folder / shard)}
        except CheckpointError as error:
            problems.append(str(error))
    with progress("compare tensors", total=sum(info.nbytes for info in checkpoint.tensors.values())) as advance:
        artefact = replace(checkpoint, path=folder)
        places = _by_tensor(checkpoint, edits)
        for name, info in checkpoint.tensors.items():
            if ours.get(name) != info:
                problems.append(f"{name} is missing, or lies elsewhere or in another dtype than in the base")
                advance(info.nbytes)
                continue
            for piece, one in places.get(name, [(info, None)]):
                if one is None:
                    pairs = zip(checkpoint.blocks(piece), artefact.blocks(piece), strict=True)
                    if not all(_same(a, b) for (_, a), (_, b) in pairs):
                        problems.append(f"{piece.name} differs from the base, though the plan does not edit it")
                else:
                    same, rounding = _compare_edited(checkpoint, artefact, piece, *one)
                    roundings.append(rounding)
                    if not same:
                        problems.append(f"{piece.name} is not the base's tensor with the plan's edit")
                advance(piece.nbytes)
    extra = sorted(set(ours) - set(checkpoint.tensors))
    problems += [f"{name} is not in the base" for name in extra]
    return Verification("checkpoint", len(checkpoint.tensors), tuple(problems), tuple(roundings))


def _by_tensor(
    checkpoint: Checkpoint, edits: Mapping[str, tuple[Edit, Site]]
) -> dict[str, list[tuple[TensorInfo, tuple[Edit, Site] | None]]]:
    """Every edited tensor of the file in its parts, each with the edit on it, if there is one.

    The scales of an fp8 matrix are compared with it, and are no part by themselves.
    """
    found: dict[str, list[tuple[TensorInfo, tuple[Edit, Site] | None]]] = {}
    for edit, site in edits.values():
        name = site.tensor if edit.tensor == site.matrix else str(site.bias)
        count = 1 if site.part is None else site.part[1]
        if site.part is None:
            found[name] = [(located(checkpoint, edit, site), (edit, site))]
        elif name not in found:
            parts = [checkpoint.tensors[name].part(i, count) for i in range(count)]
            found[name] = [(part, edits.get(part.name)) for part in parts]
        place = located(checkpoint, edit, site)
        if scales_of(checkpoint, place) is not None and f"{name}{SUFFIX}" not in found:
            scales = checkpoint.tensors[f"{name}{SUFFIX}"]
            parts = [scales.part(i, count) for i in range(count)] if count > 1 else []
            found[scales.name] = [(part, None) for i, part in enumerate(parts) if part_name(name, i) not in edits]
    return found


def _compare_edited(
    checkpoint: Checkpoint, artefact: Checkpoint, piece: TensorInfo, edit: Edit, site: Site
) -> tuple[bool, Rounding]:
    meter, same = RoundingMeter(piece.name), True
    # a vector may be stored with an axis of one
    shaped = located(checkpoint, edit, site)
    scales = scales_of(artefact, shaped)
    blocks = artefact.blocks(shaped, block_bytes(checkpoint, shaped))
    for block, (_, found) in zip(edited_blocks(checkpoint, edit, site), blocks, strict=True):
        same = same and _same(block.after, found)
        if scales is not None and block.scales is not None:
            row = block.first // scales.size[0]
            same = same and torch.equal(block.scales.float(), scales.values[row : row + len(block.scales)])
        meter.add(edit, site.orientation == "out_in", block.first, block.old, found if scales is None else block.new)
    return same, meter.result()


def _compare_adapter(
    folder: Path, plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, progress: Progress
) -> Verification:
    import tempfile

    from steer2edit.targets import lora

    with tempfile.TemporaryDirectory() as scratch, progress("compare adapter", total=1) as advance:
        lora.lower(plan, checkpoint, spec, Path(scratch), silent)
        expected, _ = load_tensors(Path(scratch) / ADAPTER_WEIGHTS)
        found, _ = load_tensors(folder / ADAPTER_WEIGHTS)
        same_config = read_json(Path(scratch) / ADAPTER_CONFIG) == read_json(folder / ADAPTER_CONFIG)
        advance(1)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not in the plan" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} differs from the plan"
        for name in sorted(expected.keys() & found.keys())
        if not _same(expected[name], found[name])
    ]
    if not same_config:
        problems.append(f"{ADAPTER_CONFIG} differs from the one that the plan gives")
    return Verification("lora", len(found), tuple(problems))


def _compare_gguf(
    folder: Path, target: str, plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, progress: Progress
) -> Verification:
    import tempfile

    module = targets.load(target)
    problems = []
    with tempfile.TemporaryDirectory() as scratch, progress("compare GGUF", total=1) as advance:
        module.lower(plan, checkpoint, spec, Path(scratch), silent)
        ours, theirs = Path(scratch) / module.FILE, folder / module.FILE
        expected_fields, expected = read_gguf(ours)
        fields, found = read_gguf(theirs)
        same = ours.read_bytes() == theirs.read_bytes()
        advance(1)
    problems += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not in the plan" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} differs from the plan"
        for name in sorted(expected.keys() & found.keys())
        if not _same(expected[name], found[name])
    ]
    problems += [
        f"the field {key} is {fields.get(key)!r}, expected {expected_fields.get(key)!r}"
        for key in sorted(expected_fields.keys() | fields.keys())
        if fields.get(key) != expected_fields.get(key)
    ]
    if not same and not problems:
        problems.append(f"{module.FILE} differs from the file that the plan gives")
    return Verification(target, len(found), tuple(problems))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def _logits(
    loaded: LoadedModel, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[torch.Tensor]:
    with around(), torch.inference_mode():
        return [
            loaded.model(**loaded.tokenizer(prompt, return_tensors="pt").to(loaded.device), use_cache=False)
            .logits.float()
            .cpu()
            for prompt in PROMPTS
        ]


def _artefact_logits(loaded: LoadedModel, folder: Path, target: str, plan: EditPlan, model: Any) -> list[torch.Tensor]:
    if target == "gguf":
        adapter = gguf.read_back(folder / gguf.FILE, plan.base, loaded.spec)
        return _logits(loaded, lambda: edited(loaded, adapter))
    if target == "gguf-vector":
        _, vectors = read_control_vector(folder / gguf_vector.FILE)
        return _logits(loaded, lambda: stream_shifted(loaded, vectors))
    if target == "lora":
        model = with_adapter(loaded.model, folder)
    return _logits(replace(loaded, model=model))


def _difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
