r"""The nearest weights to a gated vector: a ridge regression of the gate on what a writer reads.

A hook that adds v only where a condition holds, ``y + g(h) v`` with a gate g on the stream h of an earlier layer, is not linear
in the writer's input x, and no weight gives it. Of all edits of the writer the nearest in mean square is

    ΔW = E[t xᵀ] (S + λI)⁻¹,   t = g(h) v,   S = E[x xᵀ],

which for one vector is ``v aᵀ`` with ``a = (S + λI)⁻¹ E[g x]``. Its error is ``E (g − a·x)² / E g²``, measured on texts that had
no part in the fit: of five parts of the texts three fit, one chooses λ, one measures. The whole matrix S of one writer is kept
for each of the three, and nothing else: texts are read once and streamed.

Gates: ``cosine`` is 1 where ``cos(h, c)`` is above a threshold, else 0 (CAST, arXiv 2409.05907). ``relu`` is
``max(h · c − threshold, 0)``, a sparse autoencoder's feature, whose threshold is minus its encoder's bias (ActivationReasoning,
arXiv 2510.18184).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.architecture.stream import factor
from steer2edit.checkpoint import Checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, PlanError, count_of
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.distributed import whole
from steer2edit.runtime.model import LoadedModel

GateKind = Literal["cosine", "relu"]
_PARTS = ("fit", "fit", "fit", "choose", "measure")
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean diagonal of S, the values of λ that are tried."""
_LEAST = 5


@dataclass(frozen=True)
class Gate:
    """A condition on the stream after the block of ``layer``; ``direction`` is [hidden]."""

    direction: torch.Tensor
    layer: int
    threshold: float
    kind: GateKind = "cosine"

    def of(self, stream: torch.Tensor) -> torch.Tensor:
        """The gate of each state [..., hidden], float64."""
        h, c = stream.double(), self.direction.double().to(stream.device)
        if self.kind == "relu":
            return (h @ c - self.threshold).clamp(min=0)
        cosine = (h @ c) / (h.norm(dim=-1) * c.norm()).clamp(min=1e-30)
        return torch.gt(cosine, self.threshold).double()


@dataclass(frozen=True)
class GateFit:
    """The functional ``a`` [in], float32, with ``error`` on texts that had no part in it, a share of E g².

    ``ridge`` is the λ that was chosen, a share of the mean diagonal of S. ``share`` is the mean gate, and ``open`` the share of
    the tokens for which it is open. ``constant_error`` is the least error of a constant in place of a · x, which is 1 − ``open``
    for a gate of 0 and 1. ``on`` and ``off`` are the mean of a · x where the gate is open (weighed by it) and where it is shut,
    None if it never is; ``mean`` that over all. All are of the texts that measure, and ``texts`` counts those.
    """

    a: torch.Tensor
    error: float
    ridge: float
    share: float
    open: float
    constant_error: float
    on: float
    off: float | None
    mean: float
    texts: int


class _Sums:
    """Moments of one part of the texts: each text counts once."""

    def __init__(self, width: int) -> None:
        self.S = torch.zeros(width, width, dtype=torch.float64)
        self.gx = torch.zeros(width, dtype=torch.float64)
        self.open = torch.zeros(width, dtype=torch.float64)
        self.x = torch.zeros(width, dtype=torch.float64)
        self.g = self.gg = self.opened = 0.0
        self.texts = 0

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """A text's inputs [tokens, in] and gates [tokens]."""
        n, opened = len(x), (g > 0).double()
        self.S.addmm_(x.T, x, alpha=1 / n)
        self.gx += g @ x / n
        self.open += opened @ x / n
        self.x += x.mean(dim=0)
        self.g, self.gg = self.g + float(g.mean()), self.gg + float(g.square().mean())
        self.opened += float(opened.mean())
        self.texts += 1

    def constant_error(self) -> float:
        """The least error of a constant. It is that of the mean gate: 1 − (E g)² / E g²."""
        return 1 - self.g**2 / (self.texts * max(self.gg, 1e-30))

    def error(self, a: torch.Tensor) -> float:
        """E (g − a·x)² / E g²."""
        return float((self.gg - 2 * a @ self.gx + a @ self.S @ a) / max(self.gg, 1e-30))


def fit_gate(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    site: Site,
    gate: Gate,
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> GateFit:
    """Fit the gate to what ``site`` reads, at the span's positions of each example.

    Raises PlanError where the site cannot carry the edit, and DataError where a part of the texts never opens the gate.
    """
    if site.expert is not None or site.norm is not None:
        why = "an expert reads some tokens only" if site.expert is not None else "a norm stands behind it"
        raise PlanError(f"{site.key} carries no gated vector: {why}")
    if not 0 <= gate.layer < site.layer:
        raise PlanError(
            f"the gate reads the stream after layer {gate.layer}, and {site.key} writes in layer {site.layer}: a condition is "
            "known only in later layers"
        )
    sums = {part: _Sums(site.in_features) for part in _PARTS}
    for part, x, g in _passes(loaded, examples, site, gate, batch_tokens, progress):
        sums[part].add(x, g)
    if shut := [part for part, one in sums.items() if one.texts == 0 or one.gg == 0]:
        raise DataError(
            f"the gate never opens on the texts that {shut[0]} ({count_of(sums[shut[0]].texts, 'text')}): lower the threshold, "
            "or give more texts"
        )
    fit, choose, measure = sums["fit"], sums["choose"], sums["measure"]
    unit = float(fit.S.diagonal().mean())
    identity = torch.eye(site.in_features, dtype=torch.float64)
    solved = {ridge: torch.linalg.solve(fit.S + ridge * unit * identity, fit.gx) for ridge in RIDGES}
    ridge = min(solved, key=lambda one: choose.error(solved[one]))
    a = solved[ridge]
    closed = measure.texts - measure.opened
    return GateFit(
        a.float(),
        measure.error(a),
        ridge,
        measure.g / measure.texts,
        measure.opened / measure.texts,
        measure.constant_error(),
        float(a @ measure.gx) / max(measure.g, 1e-30),
        # a sum of shares differs from its count by rounding
        float(a @ (measure.x - measure.open)) / closed if closed > 1e-9 * measure.texts else None,
        float(a @ measure.x) / measure.texts,
        measure.texts,
    )


def gate_plan(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    site: Site,
    vector: torch.Tensor,
    gate: Gate,
    fit: GateFit,
    *,
    condition: str,
    name: str,
    prompts: Sequence[str] = (),
) -> EditPlan:
    """The plan of one matrix that adds ``(a · x) vector`` to the stream. ``prompts`` are digests of those it was fitted on."""
    B = vector.float() / factor(checkpoint, site)
    edit = LowRank(site.matrix, B[:, None].clone(), fit.a[None].clone(), torch.tensor([fit.mean]))
    method = {
        "name": "gate",
        "site": site.key,
        "condition": condition,
        "condition_layer": gate.layer,
        "gate": gate.kind,
        "threshold": gate.threshold,
        "ridge": fit.ridge,
        "held_out_error": fit.error,
        "held_out_texts": fit.texts,
        "gate_mean": fit.share,
        "open_share": fit.open,
        "constant_error": fit.constant_error,
        "when_open": fit.on,
        "when_shut": fit.off,
    }
    data = {"name": f"{name} if {condition}", "prompts": sorted(prompts)}
    plan = EditPlan(Base.of(checkpoint), (edit,), method=method, data=data)
    return plan.computed_from(checkpoint, spec)


def part_of(example: Encoded) -> str:
    """Which part of the texts an example belongs to; both examples of a pair to the same."""
    source = "contrast" if example.label in LABELS else example.label
    digest = hashlib.sha256(f"{source}/{example.row}".encode()).digest()
    return _PARTS[digest[0] % _LEAST]


def _passes(
    loaded: LoadedModel, examples: Sequence[Encoded], site: Site, gate: Gate, batch_tokens: int, progress: Progress
) -> Any:
    loaded.check_tokens(example.ids for example in examples)
    seen: dict[str, torch.Tensor] = {}

    def stream(_module: Any, _inputs: Any, output: Any) -> None:
        seen["stream"] = output[0] if isinstance(output, tuple) else output

    def reading(_module: Any, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
        seen["input"] = whole(inputs[0], site.in_features)

    with ExitStack() as stack, progress("gate", total=sum(len(one.ids) for one in examples)) as advance:
        block = loaded.model.get_submodule(f"{loaded.spec.block_modules}{gate.layer}")
        stack.callback(block.register_forward_hook(stream).remove)
        stack.callback(loaded.module(site).register_forward_hook(reading).remove)
        for indices in batches([len(one.ids) for one in examples], batch_tokens):
            chosen = [examples[i] for i in indices]
            ids, mask = pad_right([one.ids for one in chosen], loaded.padding, loaded.device)
            with torch.inference_mode():
                loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
                x = seen["input"].reshape(*ids.shape, -1).double().cpu()
                g = gate.of(seen["stream"]).cpu()
            for row, one in enumerate(chosen):
                span = slice(one.start - 1, len(one.ids) - 1)
                yield part_of(one), x[row, span].clone(), g[row, span].clone()
                advance(len(one.ids))
