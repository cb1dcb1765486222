"""A dry run: what a compile would read, run and write, and whether there is room. It does not run the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steer2edit import methods, targets
from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.architecture.sites import MatrixRole, Site
from steer2edit.architecture.unquantised import planned_from
from steer2edit.artefact.emit import artefact_folders
from steer2edit.artefact.foresee import foreseen_refusals
from steer2edit.artefact.request import CompileRequest
from steer2edit.capture.background import BACKGROUND_TOKENS
from steer2edit.checkpoint import DTYPES, Checkpoint, open_checkpoint
from steer2edit.checkpoint.fp8 import SUFFIX, block_size
from steer2edit.data import contrast
from steer2edit.data.everyday import as_asked, everyday_prompts
from steer2edit.data.neutral import NeutralChats
from steer2edit.data.prompts import Prompt
from steer2edit.data.templates import render_prompts, templated
from steer2edit.data.tokens import windows
from steer2edit.engines.chats import CHAT_TOKENS, USER_ANSWER_TOKENS
from steer2edit.engines.own_answers import ANSWER_TOKENS, known_texts
from steer2edit.errors import DataError, TargetError
from steer2edit.lowering import Writing, resolve
from steer2edit.lowering.disk_use import DiskUse, check_room, disk_use, memory_free, memory_now
from steer2edit.plan import Base, EditPlan, LowRank, Structure
from steer2edit.plan.measured import TextKind
from steer2edit.runtime.model import Runtime, load_tokenizer, pick_device
from steer2edit.runtime.number_format import resolved_dtype
from steer2edit.search.reach import check_aim
from steer2edit.strength.kl import MAX_TOKENS
from steer2edit.strength.neutral_texts import packaged_prompts

# a search for the strength seldom takes more; each is a pass over the neutral text
SEARCH_PASSES = 8


@dataclass(frozen=True)
class DryRun:
    """A compile in numbers. ``matrices`` may be edited at most, ``read`` are their bytes; ``model`` is the running model's.

    ``tokens`` are those of the capture, ``examples`` the data's; ``own_answers`` are tokens that the base writes for the
    capture's background, at most, where no earlier run has kept them. A pass of the search for a strength compares ``neutral``
    tokens at most, of the kind ``neutral_kind``, of which the base writes ``neutral_own`` once. ``capture`` and ``search`` are
    seconds, from the rate at which this device multiplies matrices of this model's width; None where the model runs on none
    that can be timed here. ``may_be_refused`` are the targets that refuse some of what the method may edit, with what they say.
    """

    matrices: int
    read: int
    model: int
    memory: int
    memory_free: int | None
    examples: int
    tokens: int
    own_answers: int
    neutral: int
    neutral_kind: TextKind
    neutral_own: int
    capture: float | None
    search: float | None
    targets: tuple[DiskUse, ...]
    may_be_refused: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        """The numbers in plain values."""
        return {
            **{key: value for key, value in vars(self).items() if key != "targets"},
            "may_be_refused": list(self.may_be_refused),
            "targets": [{**vars(one), "fits": one.fits} for one in self.targets],
            "problems": list(self.problems),
        }

    @property
    def problems(self) -> tuple[str, ...]:
        """What stands in the way."""
        found = [
            f"{one.target} needs {one.written / 1e9:.2f} GB, and the disk has {one.free / 1e9:.2f} GB free"
            for one in self.targets
            if not one.fits
        ]
        if self.memory_free is not None and self.memory > self.memory_free:
            found.append(
                f"the model takes {self.memory / 1e9:.2f} GB of memory, and {self.memory_free / 1e9:.2f} GB are free: a smaller "
                "--dtype, or --device-map auto, takes less"
            )
        return tuple(found)


@dataclass(frozen=True)
class Opened:
    """A request's model, after every check that needs no running model.

    ``planned`` is what a plan reads: the checkpoint, or the unquantised form of a quantised one. ``widest`` edits all that the
    method may edit, and ``may_be_refused`` is what the targets refuse of it.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    planned: Checkpoint
    widest: EditPlan
    may_be_refused: tuple[str, ...]


def opened(request: CompileRequest) -> Opened:
    """The request's model. Raises a Steer2EditError for what can be known to be wrong before the model runs."""
    checkpoint = open_checkpoint(request.model, request.revision)
    spec = read_spec(checkpoint)
    for target in request.to:
        targets.check_quantised(target, checkpoint)
    planned = planned_from(checkpoint, spec, request.weights)
    if request.vectors is not None:
        request.vectors.check(spec)
    if request.statistics is not None:
        request.statistics.check_model(checkpoint)
    if request.aim is not None and request.questions is not None:
        check_aim(request.questions, request.metric, request.aim)
    widest = widest_plan(checkpoint, spec, request.method, request.options)
    return Opened(checkpoint, spec, planned, widest, foreseen_refusals(widest, checkpoint, spec, request.to))


def check_targets(checkpoint: Checkpoint, spec: ModelSpec, methods: Sequence[str], chosen: Sequence[str]) -> None:
    """Raise TargetError where a target carries no plan that one of the methods makes with its own options."""
    for target in chosen:
        targets.load(target)
        targets.check_quantised(target, checkpoint)
        refusals = []
        for method in methods:
            try:
                foreseen_refusals(widest_plan(checkpoint, spec, method, None), checkpoint, spec, [target])
            except TargetError as refusal:
                refusals.append(refusal)
        if refusals and len(refusals) == len(methods):
            raise refusals[0]


def dry_run(request: CompileRequest) -> DryRun:
    """Go through a compile up to the point where the model would run.

    Raises what :func:`steer2edit.compiler.compile` would raise there.
    """
    folders = artefact_folders(request.out, request.to, request.force, [request.model])
    base = opened(request)
    checkpoint, spec, plan = base.checkpoint, base.spec, base.widest
    numel = sum(_numel(checkpoint, name) for name in checkpoint.tensors if not name.endswith(SUFFIX))
    device = pick_device(request.runtime.device)
    dtype = _dtype(request.runtime, device, checkpoint.path)
    tokenizer = load_tokenizer(checkpoint.path, request.runtime.trust_remote_code)
    examples, tokens, own = _tokens(tokenizer, request)
    kind, read, compared, written_for_it = _neutral(tokenizer, request)
    rate = _multiplications(spec.hidden_size, dtype, device) if request.runtime.device_map is None else None
    active, head = _active(checkpoint, spec), spec.embedding.in_features * spec.hidden_size
    passes = 1 if request.fixed_strength is not None else SEARCH_PASSES
    resolved = resolve(plan, checkpoint, spec)
    written = [
        disk_use(resolved, target, folder, request.writing, whole_model=targets.load(target).WHOLE_MODEL)
        for target, folder in folders.items()
    ]
    size = numel * torch.empty(0, dtype=dtype).element_size()
    if checkpoint.quantisation is not None:
        packed = [info for info in checkpoint.tensors.values() if info.packed is not None]
        size = (numel - sum(_numel(checkpoint, info.name) for info in packed)) * torch.empty(
            0, dtype=dtype
        ).element_size()
        size += sum(info.stored_bytes for info in packed)
    # fp8 is taken apart beside the model that it becomes
    twice = 2 if block_size(checkpoint.config) and device.type == "cpu" else 1
    return DryRun(
        matrices=len(plan.edits),
        read=sum(
            spec.owners[edit.tensor].locate(base.planned).stored_bytes
            for edit in plan.edits
            if isinstance(edit, LowRank)
        ),
        model=size,
        memory=memory_now() + (twice * size if device.type == "cpu" else 0),
        memory_free=memory_free(),
        examples=examples,
        tokens=tokens,
        own_answers=own,
        neutral=compared,
        neutral_kind=kind,
        neutral_own=written_for_it,
        capture=None if rate is None else (tokens + own) * active / rate,
        search=None
        if rate is None
        else (written_for_it * (active + head) + (1 + passes) * (read * active + compared * 2 * head)) / rate,
        targets=tuple(written),
        may_be_refused=base.may_be_refused,
    )


def check_rooms(base: Opened, folders: Mapping[str, Path], writing: Writing) -> None:
    """Raise TargetError where a target would not fit its disk, whatever the plan turns out to be."""
    resolved = resolve(base.widest, base.checkpoint, base.spec)
    for target, folder in folders.items():
        whole = targets.load(target).WHOLE_MODEL
        check_room(disk_use(resolved, target, folder, writing, whole_model=whole, measure=False), folder)


def widest_plan(checkpoint: Checkpoint, spec: ModelSpec, method: str, options: Any) -> EditPlan:
    """A plan of zeros on every matrix that a method may edit with these options.

    ``widest`` of the method's module says which, and ``structure`` what it removes.
    """
    module = methods.load(method)
    options = module.Options() if options is None else options
    if hasattr(options, "layers"):
        # which layers are discriminative is not known before the data is captured
        options = replace(options, layers=methods.edited_layers(options))
    if hasattr(module, "widest"):
        structure = module.structure(spec, options) if hasattr(module, "structure") else Structure()
        return EditPlan(Base.of(checkpoint), tuple(module.widest(spec, options)), structure=structure)
    first, last = spec.layer_range(getattr(options, "layers", None))
    kinds = {"attn": {MatrixRole.ATTN_OUT}, "mlp": {MatrixRole.MLP_OUT}}.get(getattr(options, "sites", "both"))
    sites: list[Site] = [
        site for site in spec.sites if first <= site.layer <= last and (kinds is None or site.role.kind in kinds)
    ]
    sites += [spec.embedding] if getattr(options, "embedding", False) else []
    zero = torch.zeros(1, 1)  # one number for all: a mixture may have ten thousand matrices
    edits = (LowRank(s.matrix, zero.expand(s.out_features, 1), zero.expand(1, s.in_features)) for s in sites)
    return EditPlan(Base.of(checkpoint), tuple(edits))


def _numel(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.tensors[name]
    if name.endswith("_blocks"):
        return 2 * info.nbytes  # mxfp4: two numbers in a byte
    return info.nbytes // (DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 1)


def _dtype(runtime: Runtime, device: torch.device, folder: Path) -> torch.dtype:
    name = resolved_dtype(runtime.dtype, device, folder)
    return torch.bfloat16 if name == "auto" else getattr(torch, name)


def _tokens(tokenizer: Any, request: CompileRequest) -> tuple[int, int, int]:
    """Examples, the tokens that a capture runs over, and those of them, at most, that the base writes."""
    if request.behavior is None:
        return sum(request.statistics.examples.values()) if request.statistics is not None else 0, 0, 0
    behavior = request.behavior
    chats = [one for one in (request.background, request.texts_to_keep) if isinstance(one, NeutralChats)]
    texts = [one for one in (request.background, request.texts_to_keep) if not isinstance(one, NeutralChats | None)]
    if request.background is None or isinstance(request.background, NeutralChats):
        texts.append(contrast.background_text())
    read = [
        window
        for one in texts
        for window in windows(tokenizer, [one] if isinstance(one, str) else list(one), BACKGROUND_TOKENS)
    ]
    encoded = behavior.encode(tokenizer) if behavior.examples else []
    asked: Sequence[Sequence[int]] = ()
    if not isinstance(request.background, NeutralChats):
        asked = _asked(tokenizer, as_asked(everyday_prompts("background"), tokenizer))
    own = len(asked) * ANSWER_TOKENS + sum(_compared_and_written(one)[1] for one in chats)
    asked = [*asked, *(row for one in chats for row in _asked(tokenizer, [chat.prompt for chat in one.chats]))]
    answered = len(asked) * ANSWER_TOKENS
    return len(behavior.examples), sum(map(len, [*read, *asked])) + sum(len(one.ids) for one in encoded) + answered, own


def _neutral(tokenizer: Any, request: CompileRequest) -> tuple[TextKind, int, int, int]:
    """Of the budget's text: its kind, and how many tokens are read, compared and written by the base."""
    own = request.neutral
    if isinstance(own, NeutralChats):
        prompts = [one.prompt for one in own.chats]
        compared, written = _compared_and_written(own)
    elif own is not None:
        return "prose", MAX_TOKENS, MAX_TOKENS, 0
    else:
        prompts = as_asked(packaged_prompts(), tokenizer)
        compared = written = len(prompts) * ANSWER_TOKENS
    asked = _asked(tokenizer, prompts)
    if not asked:
        return "prose", MAX_TOKENS, MAX_TOKENS, 0
    return "chat" if templated(tokenizer) else "answers", compared + sum(map(len, asked)), compared, written


def _compared_and_written(own: NeutralChats) -> tuple[int, int]:
    """Tokens of a user's chats that are read as answers, and those that the base writes, at most."""
    answers = sum(USER_ANSWER_TOKENS if one.answer else ANSWER_TOKENS for one in own.chats)
    return min(answers, CHAT_TOKENS), sum(not one.answer for one in own.chats) * ANSWER_TOKENS


def _asked(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokens of prompts that the base answers.

    There are none where the template rejects them or their words are unknown, as the run itself leaves them out.
    """
    try:
        texts = render_prompts(dict.fromkeys(prompts, "a prompt that the base answers"), tokenizer)
        return known_texts(tokenizer, list(texts.values()), not templated(tokenizer))[1]
    except DataError:
        return []


def _active(checkpoint: Checkpoint, spec: ModelSpec) -> float:
    """Multiply-adds of one token in the blocks: the entries of their matrices, of experts those that are chosen."""
    total = 0.0
    fused = {name: router for router in spec.routers for name in router.fused}
    separate = {router.folder: router for router in spec.routers if router.folder is not None}
    for name, info in checkpoint.tensors.items():
        embeds = name == spec.embedding.tensor or "lm_head" in name or "embed" in name
        if len(info.shape) < 2 or embeds or name.endswith(SUFFIX):
            continue
        router = fused.get(name) or next((r for folder, r in separate.items() if name.startswith(folder)), None)
        total += _numel(checkpoint, name) * (1.0 if router is None else router.top_k / router.experts)
    return total


def _multiplications(hidden: int, dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds per second of products like a layer's, measured for about a third of a second."""
    a, b = torch.randn(512, hidden).to(device, dtype), torch.randn(hidden, 4 * hidden).to(device, dtype)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.3:
        float((a @ b)[0, 0])  # waits for the device
        done += 1
    return done * 512 * hidden * 4 * hidden / (time.perf_counter() - start)
