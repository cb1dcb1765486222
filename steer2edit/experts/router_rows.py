"""A router row that no token chooses, for routers that have no bias to say so.

Two candidates are tried on calibration tokens. The mean of the other experts' rows needs no data: its logit is the mean of
theirs, so it is seldom among the best. And ``-β u``, where ``u · x > 0`` for every router input x seen: that puts the logit
far below all others wherever the inputs share a direction, as those of trained models do. The better one is then certified
on other tokens, in the running model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from steer2edit.architecture.routers import Router
from steer2edit.experts.edits import RowFit
from steer2edit.plan import Assign, Base, EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.expert_modules import deciding, router_inputs, routing_tensor
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel

# standard deviations that the logit sits under the others'
_DEPTH = 30.0
_STEPS = 200
_SHARPNESS = 10.0


def fit_rows(
    loaded: LoadedModel,
    off: Mapping[int, Sequence[int]],
    calibration: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    progress: Progress = silent,
) -> dict[tuple[int, int], RowFit]:
    """A row for each expert of ``off`` (numbers by layer), certified on ``held_out``; both texts are token ids in windows."""
    routers = [loaded.spec.router(layer) for layer in off]
    inputs = _inputs(loaded, routers, calibration, progress)
    rows = {
        router.layer: _best_row(
            routing_tensor(loaded.model, router, bias=False).float().cpu(),
            inputs[router.layer],
            off[router.layer],
            router,
        )
        for router in routers
    }
    plan = EditPlan(
        Base("", None, ""),
        tuple(
            Assign(
                router.tensor, tuple(off[router.layer]), rows[router.layer].expand(len(off[router.layer]), -1).clone()
            )
            for router in routers
        ),
    )
    with edited(loaded, plan):
        shares, tokens = selection_shares(loaded, routers, held_out, progress)
    return {
        (layer, expert): RowFit(rows[layer], float(shares[layer][expert]), tokens)
        for layer, experts in off.items()
        for expert in experts
    }


def selection_shares(
    loaded: LoadedModel, routers: Sequence[Router], windows: Sequence[Sequence[int]], progress: Progress = silent
) -> tuple[dict[int, torch.Tensor], int]:
    """The share of tokens that choose each expert, [experts] by layer, and the number of tokens.

    The model is run as it is now.
    """
    counts = {router.layer: torch.zeros(router.experts, dtype=torch.long) for router in routers}
    real: list[torch.Tensor] = []

    def count(router: Router, chosen: torch.Tensor, _weights: torch.Tensor) -> None:
        kept = chosen.cpu()[real[0]].flatten()
        counts[router.layer] += torch.bincount(kept, minlength=router.experts)[: router.experts]

    with ExitStack() as stack:
        for router in routers:
            stack.enter_context(deciding(loaded.model, router, partial(count, router)))
        tokens = _run(loaded, windows, real, "routing", progress)
    return {layer: found.double() / max(tokens, 1) for layer, found in counts.items()}, tokens


def _inputs(
    loaded: LoadedModel, routers: Sequence[Router], windows: Sequence[Sequence[int]], progress: Progress
) -> dict[int, torch.Tensor]:
    found: dict[int, list[torch.Tensor]] = {router.layer: [] for router in routers}
    real: list[torch.Tensor] = []

    def keep(router: Router, x: torch.Tensor) -> None:
        found[router.layer].append(x.float().cpu()[real[0]])

    with ExitStack() as stack:
        for router in routers:
            stack.enter_context(router_inputs(loaded.model, router, partial(keep, router)))
        _run(loaded, windows, real, "router inputs", progress)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _run(
    loaded: LoadedModel, windows: Sequence[Sequence[int]], real: list[torch.Tensor], stage: str, progress: Progress
) -> int:
    """Run the model over windows; ``real`` holds, while each batch runs, which of its flattened positions are not padding."""
    pad = loaded.padding
    total = sum(map(len, windows))
    with progress(stage, total=total) as advance, torch.inference_mode():
        for chosen in batches([len(window) for window in windows], 2048):
            texts = [windows[i] for i in chosen]
            ids, mask = pad_right(texts, pad, loaded.device)
            real[:] = [mask.flatten().bool().cpu()]
            loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
            advance(sum(map(len, texts)))
    return total


def _best_row(W: torch.Tensor, X: torch.Tensor, off: Sequence[int], router: Router) -> torch.Tensor:
    """The candidate [hidden] that fewest of the inputs ``X`` [n, hidden] choose, given the router's matrix ``W``."""
    others = [expert for expert in range(router.experts) if expert not in off]
    logits = X @ W[others].T
    candidates = [W[others].mean(dim=0)]
    u = separating(X)
    margin = (X @ u).clamp(min=0).quantile(0.01) if len(X) else torch.tensor(0.0)
    if float(margin) > 0:
        candidates.append(-_DEPTH * float(logits.std()) / float(margin) * u)
    least = logits.topk(router.top_k, dim=1).values[:, -1]
    taken = [float((X @ row >= least).float().mean()) for row in candidates]
    return candidates[taken.index(min(taken))]


def separating(X: torch.Tensor) -> torch.Tensor:
    """A direction u [hidden] of length one with ``u · x > 0`` for many rows x.

    The rows are those of ``X`` [n, hidden].

    Logistic regression of one class through the origin, begun at the mean: where some plane has all rows on one side, its
    loss falls to nothing as ``u`` grows.
    """
    rows = torch.nn.functional.normalize(X, dim=1)
    u = rows.mean(dim=0).requires_grad_()
    solver = torch.optim.LBFGS([u], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.softplus(-(rows @ u) * _SHARPNESS).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return torch.nn.functional.normalize(u.detach(), dim=0)
