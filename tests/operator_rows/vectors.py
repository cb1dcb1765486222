"""Systems that add a vector at run time and differ in where it comes from: each is a constant, at one block or at the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from operator_rows.row import EXACT, Hook, Row, adding, planned, steered
from operator_rows.subject import Subject
from steer2edit.capture.background import background_examples
from steer2edit.capture.dictionary import Settings, by_dictionary
from steer2edit.capture.vector_kinds import VectorKind
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.data.tokens import Span
from steer2edit.methods import constant, make_plan
from steer2edit.plan import EditPlan, merge
from steer2edit.scoring.scores import Scoring

CARRIED = {"checkpoint": EXACT, "lora": EXACT, "gguf-vector": EXACT}
"""A constant after one block: a bias, or llama.cpp's control vector, which is that constant."""


def _block(subject: Subject, layer: int) -> str:
    return f"{subject.spec.block_modules}{layer}"


def _added(span: Span, vector: VectorKind, layer: int) -> Callable[[Subject], Mapping[str, Hook]]:
    """The stream after a block, with the vector added at every token."""

    def hooks(subject: Subject) -> Mapping[str, Hook]:
        v = steered(subject, span, vector).difference(f"residual.{layer}")
        return {_block(subject, layer): adding(v)}

    return hooks


def _last_token_means(subject: Subject) -> Mapping[str, Hook]:
    """Of the answers' last tokens, from passes of the model over each text by itself."""
    states: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    seen: list[torch.Tensor] = []
    module = subject.loaded.model.get_submodule(_block(subject, 1))
    handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for one in replace(subject.behavior, span="response").encode(subject.loaded.tokenizer, subject.loaded.context):
        with torch.inference_mode():
            subject.loaded.model(torch.tensor([one.ids]), use_cache=False)
        # the last token is that which ends the turn
        states[one.label].append(seen.pop()[0, -2].double())
    handle.remove()
    v = torch.stack(states["positive"]).mean(dim=0) - torch.stack(states["negative"]).mean(dim=0)
    return {_block(subject, 1): adding(v)}


def _principal(subject: Subject) -> Mapping[str, Hook]:
    D = subject.captured("last").pairs["residual.1"].double()
    u = torch.linalg.svd(D, full_matrices=False).Vh[0]
    return {_block(subject, 1): adding(u * (u @ D.mean(dim=0)))}


def _of_length(vector: VectorKind) -> Callable[[Subject], Mapping[str, Hook]]:
    """The vector added after the last block, and the stream brought back to its length."""

    def hooks(subject: Subject) -> Mapping[str, Hook]:
        last = subject.spec.layers - 1
        v = steered(subject, "matched", vector).difference(f"residual.{last}")

        def keeping(_x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            moved = h + v
            return moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)

        return {_block(subject, last): keeping}

    return hooks


def _last_layer(command: str) -> Callable[[Subject], EditPlan]:
    return lambda subject: planned(subject, command.replace("LAST", str(subject.spec.layers - 1)))


def _dictionary(subject: Subject) -> Vectors:
    loaded = subject.loaded
    examples = [*subject.behavior.encode(loaded.tokenizer, loaded.context), *background_examples(loaded)]
    return by_dictionary(loaded, examples, 1, Settings(atoms=32))[0]


def _planned_atoms(subject: Subject) -> EditPlan:
    statistics = substituted(_dictionary(subject), subject.statistics, subject.checkpoint, subject.spec)
    scoring = Scoring(subject.checkpoint, subject.spec, statistics)
    return make_plan(scoring, method="constant", options=constant.Options(layer=1))


def _atoms(subject: Subject) -> Mapping[str, Hook]:
    return {_block(subject, 1): adding(_dictionary(subject).directions["residual.1"].double())}


def _two_traits(subject: Subject) -> EditPlan:
    one, other = (planned(subject, f"--method constant --layer 1 --vector {kind}") for kind in ("mean", "median"))
    return merge([one, other], [1.0, -0.5])


def _summed(subject: Subject) -> Mapping[str, Hook]:
    v = [steered(subject, "matched", kind).difference("residual.1") for kind in ("mean", "median")]
    return {_block(subject, 1): adding(v[0] - 0.5 * v[1])}


_ADDS = "a forward hook on the block adds the vector at every token"
_LAST = "--method constant --layer LAST --vector gradient --norm-preserving"
ROWS = (
    Row(
        "ASC (2507.04742)",
        "h + v, v the mean difference at the last token",
        "--method constant --layer 1 --span last",
        _ADDS,
        _last_token_means,
        carried=CARRIED,
    ),
    Row(
        "RepE for reasoning (2504.19483)",
        "h + v, v the principal direction of paired differences at the last token",
        "--method constant --layer 1 --span last --vector pca",
        _ADDS,
        _principal,
        carried=CARRIED,
    ),
    Row(
        "TraitBasis (2510.04491)",
        "h + Σ w_i v_i",
        "compile MODEL --plan A --plan B --weight 1 --weight -0.5, of two plans of --method constant --layer 1",
        _ADDS,
        _summed,
        carried=CARRIED,
        plan=_two_traits,
    ),
    Row(
        "GrAInS (2507.18043)",
        "‖h‖ (h + v) / ‖h + v‖ after the last block, v of integrated gradients",
        _LAST,
        "a forward hook on the last block adds v and restores the length",
        _of_length("gradient"),
        carried=CARRIED,
        plan=_last_layer(_LAST),
    ),
    Row(
        "GrAInS (2507.18043)",
        "h + v, v of integrated gradients",
        "--method constant --layer 1 --vector gradient",
        _ADDS,
        _added("matched", "gradient", 1),
        carried=CARRIED,
    ),
    Row(
        "ITDA (2505.17769)",
        "h + Σ_a d_a atom_a",
        "--vectors FILE --method constant --layer 1, of vectors MODEL --kind dictionary --layer 1",
        _ADDS,
        _atoms,
        carried=CARRIED,
        plan=_planned_atoms,
    ),
)
