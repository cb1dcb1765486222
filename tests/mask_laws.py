"""What a mask is compared with, on a tiny mixture: the model whose routers cannot see the experts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from mixture_models import Case

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.experts.edits import How, Request, lower_experts
from steer2edit.experts.router_rows import fit_rows, selection_shares
from steer2edit.plan import EditPlan
from steer2edit.runtime.expert_modules import without
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, load_tokenizer, load_weights

# two experts of every layer
OFF = (1, 6)
PROBE = torch.randint(4, 70, (6, 24), generator=torch.Generator().manual_seed(1)).tolist()
TEXT = torch.randint(4, 70, (40, 24), generator=torch.Generator().manual_seed(2)).tolist()


def everywhere(case: Case, off: Sequence[int] = OFF) -> list[tuple[int, int]]:
    """The experts ``off`` of every mixture layer, as pairs."""
    return [(router.layer, expert) for router in case.spec.routers for expert in off]


def mask_plan(case: Case, how: How, bound: float = 0.05) -> EditPlan:
    request = Request.of(everywhere(case))
    rows = fit_rows(case.loaded(), request.off, TEXT, PROBE) if how == "row" else None
    return lower_experts(case.checkpoint, case.spec, request, how=how, rows=rows, bound=bound)


def artefact(case: Case, plan: EditPlan, folder: Path) -> LoadedModel:
    """The checkpoint that a plan gives, loaded."""
    emit(plan, case.checkpoint, case.spec, "checkpoint", folder)
    spec = read_spec(open_checkpoint(folder))
    return LoadedModel(load_weights(folder), load_tokenizer(folder), spec, folder)


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(input_ids=torch.tensor(PROBE), use_cache=False).logits
        return found


def reference(case: Case, loaded: LoadedModel, *, absent: bool) -> torch.Tensor:
    """The base's logits when its routers cannot see the experts."""
    with ExitStack() as stack:
        for router in case.spec.routers:
            stack.enter_context(without(loaded.model, router, OFF, absent=absent))
        return logits(loaded)


def silenced(case: Case, loaded: LoadedModel) -> torch.Tensor:
    """The base's logits when those experts give nothing."""
    with edited(loaded, mask_plan(case, "zero")):
        return logits(loaded)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def selected(case: Case, loaded: LoadedModel) -> float:
    """The largest share of tokens that choose one of the experts."""
    shares, _ = selection_shares(loaded, case.spec.routers, PROBE)
    return max(float(shares[layer][expert]) for layer, expert in everywhere(case))
