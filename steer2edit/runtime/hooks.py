"""A loaded model under a plan or under steering vectors: applied by hooks, and taken off again.

What a plan does to the weights is done here to the activations, exactly, so that a plan is tried without a weight written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.config import TOP_K
from steer2edit.errors import ArchitectureError, PlanError
from steer2edit.plan import Assign, Bias, Edit, EditPlan, LowRank, Scale
from steer2edit.runtime.expert_modules import Routed, Visit, experts_module, routing_tensor, visiting, without
from steer2edit.runtime.model import LoadedModel, device_of


@contextmanager
def edited(loaded: LoadedModel, plan: EditPlan, strength: float = 1.0) -> Iterator[None]:
    """Within the block the model behaves as if ``strength`` times the plan were in its weights.

    The update is applied as ``y + B (A x)`` at each edited matrix, in the activations' dtype or better, so a plan is tried
    without touching a weight; routers' rows and biases are set, and set back. Removed experts are masked as *absent*.
    """
    with ExitStack() as stack:
        for site, edits in _by_site(loaded.spec, plan):
            if site.role is MatrixRole.ROUTER:
                stack.enter_context(_routing_set(loaded, site, edits))
            elif site.expert is None:
                module = loaded.module(site)
                hook = _embedding_hook if site.role is MatrixRole.EMBED else _linear_hook
                stack.enter_context(_hooked(module, hook(site, edits, strength, device_of(module))))
        for layer, experts in _experts_by_layer(loaded.spec, plan).items():
            router = loaded.spec.router(layer)
            device = device_of(experts_module(loaded.model, router))
            changes = {site.expert: _changes(site, edits, strength, device) for site, edits in experts}
            stack.enter_context(visiting(loaded.model, router, _changing(changes)))
        for layer, gone in plan.structure.remove.items():
            stack.enter_context(without(loaded.model, loaded.spec.router(layer), gone, absent=True))
        if plan.structure.top_k is not None:
            stack.enter_context(_experts_per_token(loaded, plan.structure.top_k))
        yield


@contextmanager
def steered(loaded: LoadedModel, vectors: Mapping[str, torch.Tensor], strength: float) -> Iterator[None]:
    """Within the block ``strength`` times a vector ``[out]`` is added to each named site's output (activation steering)."""
    with ExitStack() as stack:
        for key, vector in vectors.items():
            module = loaded.module(loaded.spec.site(key))
            shift = (strength * vector).to(device_of(module), torch.float32)
            stack.enter_context(_hooked(module, lambda _m, _i, out, shift=shift: (out + shift).to(out.dtype)))
        yield


@contextmanager
def stream_shifted(loaded: LoadedModel, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within the block a vector ``[hidden]`` is added to the residual stream after each named layer's block."""
    device = loaded.device

    def shifting(vector: torch.Tensor) -> Callable[..., Any]:
        shift = vector.to(device, torch.float32)

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            moved = (stream + shift.to(stream.device)).to(stream.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    with ExitStack() as stack:
        for layer, vector in vectors.items():
            module = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.enter_context(_hooked(module, shifting(vector)))
        yield


def _by_site(spec: ModelSpec, plan: EditPlan) -> list[tuple[Site, list[Edit]]]:
    unknown = [edit.tensor for edit in plan.edits if edit.tensor not in spec.owners]
    if unknown:
        raise PlanError(f"the plan edits {unknown[0]}, which is not a residual writer of this model")
    grouped: dict[str, tuple[Site, list[Edit]]] = {}
    for edit in plan.edits:
        site = spec.owners[edit.tensor]
        grouped.setdefault(site.key, (site, []))[1].append(edit)
    return list(grouped.values())


def _experts_by_layer(spec: ModelSpec, plan: EditPlan) -> dict[int, list[tuple[Site, list[Edit]]]]:
    found: dict[int, list[tuple[Site, list[Edit]]]] = {}
    for site, edits in _by_site(spec, plan):
        if site.expert is not None:
            found.setdefault(site.layer, []).append((site, edits))
    return found


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _changes(site: Site, edits: Sequence[Edit], strength: float, device: torch.device) -> list[Change]:
    """The output ``y`` [n, out] as edits of a matrix and its bias change it.

    ``x`` [n, in] is the input. Both are float32.
    """
    made: list[Change] = []
    gains = {edit.tensor: edit.factor for edit in edits if isinstance(edit, Scale)}
    if gains:
        parts = {name for name in (site.matrix, site.bias_vector) if name}
        if set(gains) != parts or len(set(gains.values())) > 1:
            raise PlanError(
                f"the plan scales {', '.join(sorted(gains))} alone; expected one gain for {', '.join(sorted(parts))}"
            )
        gain = next(iter(gains.values()))
        made.append(lambda x, y: y * gain)
    for edit in edits:
        if isinstance(edit, LowRank):
            a, b = (strength * edit.A).to(device).T, edit.B.to(device).T
            made.append(lambda x, y, a=a, b=b: y + (x @ a) @ b)  # type: ignore[misc]
        elif isinstance(edit, Bias):
            delta = (strength * edit.delta).to(device)
            made.append(lambda x, y, delta=delta: y + delta)  # type: ignore[misc]
        elif isinstance(edit, Assign):
            raise PlanError(f"the plan sets rows of {edit.tensor}, which is not a router")
    return made


def _changing(changes: Mapping[int | None, Sequence[Change]]) -> Visit:
    def visit(routed: Routed) -> torch.Tensor | None:
        if routed.expert not in changes:
            return None
        x, y = routed.inner.float(), routed.output.float()
        for change in changes[routed.expert]:
            y = change(x, y)
        return y.to(routed.output.dtype)

    return visit


@contextmanager
def _routing_set(loaded: LoadedModel, site: Site, edits: Sequence[Edit]) -> Iterator[None]:
    router = loaded.spec.router(site.layer)
    with ExitStack() as stack:
        for edit in edits:
            tensor = routing_tensor(loaded.model, router, bias=edit.tensor != site.matrix)
            before = tensor.data.clone()
            stack.callback(tensor.data.copy_, before)
            # a copy: of a float32 tensor, float() and flatten() would give ``before`` itself
            wide = before.to(torch.float32, copy=True)
            edit.apply(wide if edit.tensor == site.matrix else wide.flatten(), 0, True)
            tensor.data.copy_(wide.view(tensor.shape))
        yield


@contextmanager
def _experts_per_token(loaded: LoadedModel, top_k: int) -> Iterator[None]:
    held: list[tuple[Any, str]] = []
    for router in loaded.spec.routers:
        block = loaded.model.get_submodule(router.experts_module.rpartition(".")[0])
        own = [(module, "top_k") for module in block.modules() if isinstance(getattr(module, "top_k", None), int)]
        # Gemma 4's routers ask their config in every pass
        config = getattr(loaded.model.get_submodule(router.router_module), "config", None)
        asked = [(config, name) for name in TOP_K if isinstance(getattr(config, name, None), int)]
        held += own or asked
    if not held:
        raise ArchitectureError(f"transformers' {type(loaded.model).__name__} keeps no number of experts per token")
    before = [getattr(holder, name) for holder, name in held]
    try:
        for holder, name in held:
            setattr(holder, name, top_k)
        yield
    finally:
        for (holder, name), value in zip(held, before, strict=True):
            setattr(holder, name, value)


def _linear_hook(site: Site, edits: list[Edit], strength: float, device: torch.device) -> Callable[..., torch.Tensor]:
    changes = _changes(site, edits, strength, device)

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # of a model on several devices a hook sees the input before it was moved
        x, y = inputs[0].to(output.device, torch.float32), output.to(torch.float32)
        for change in changes:
            y = change(x, y)
        return y.to(output.dtype)

    return hook


def _embedding_hook(
    site: Site, edits: list[Edit], strength: float, device: torch.device
) -> Callable[..., torch.Tensor]:
    pairs = [((strength * e.A).to(device).T, e.B.to(device).T) for e in edits if isinstance(e, LowRank)]

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # some families scale the embedding's rows inside the module
        scale = float(getattr(module, "embed_scale", 1.0))
        for a, b in pairs:
            output = output + (scale * (a[inputs[0]] @ b)).to(output.dtype)
        return output

    return hook


@contextmanager
def _hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
