"""A loaded model under a plan or under steering vectors: applied by hooks, and taken off again.

What a plan does to the weights is done here to the activations, exactly, so that a plan is tried without a weight written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.config import TOP_K
from steer2edit.errors import ArchitectureError, PlanError
from steer2edit.plan import Assign, Bias, Edit, EditPlan, LowRank, Scale
from steer2edit.plan.operations import ScaleAdd, addition_of, scales_of
from steer2edit.runtime import expert_modules
from steer2edit.runtime.expert_modules import (
    Again,
    Routed,
    Visit,
    Widen,
    experts_module,
    routing_tensor,
    visiting,
    without,
)
from steer2edit.runtime.model import LoadedModel, device_of


@contextmanager
def edited(loaded: LoadedModel, plan: EditPlan, strength: float = 1.0) -> Iterator[None]:
    """Within the block the model behaves as if ``strength`` times the plan were in its weights.

    The update is applied as ``y + B (A x)`` at each edited matrix, in the activations' dtype or better, so a plan is tried
    without touching a weight. Where columns are scaled, the module runs again on its input times their factors. Routers' rows
    and biases are set, and set back. Removed experts are masked as *absent*. Removed layers run, so that a cache counts right,
    and their stream goes on as it came.
    """
    with ExitStack() as stack:
        for site, edits in _by_site(loaded.spec, plan):
            if site.role is MatrixRole.ROUTER:
                stack.enter_context(_routing_set(loaded, site, [edit.scaled(strength) for edit in edits]))
            elif site.role is MatrixRole.EMBED:
                module = loaded.module(site)
                stack.enter_context(_hooked(module, _embedding_hook(site, edits, strength, device_of(module))))
            elif site.expert is None:
                for module, part, outputs in _modules(loaded, site, edits):
                    hook = _linear_hook(site, part, strength, device_of(module), outputs)
                    stack.enter_context(_hooked(module, hook))
        for layer, experts in _experts_by_layer(loaded.spec, plan).items():
            router = loaded.spec.router(layer)
            module = experts_module(loaded.model, router)
            device = device_of(module)
            changes = {
                site.expert: _changes(site, edits, strength, device)
                for site, edits in experts
                if site.role is MatrixRole.EXPERT_OUT
            }
            inputs: dict[int | None, list[tuple[Site, list[Change]]]] = {}
            for site, edits in experts:
                if site.role is not MatrixRole.EXPERT_OUT:
                    inputs.setdefault(site.expert, []).append((site, _changes(site, edits, strength, device)))
            widened = {expert: _widening(ones) for expert, ones in inputs.items()}
            stack.enter_context(visiting(loaded.model, router, _changing(module, changes), widened))
        for layer in plan.structure.layers:
            block = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.callback(block.register_forward_hook(_skipping, with_kwargs=True).remove)
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


def _skipping(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _by_site(spec: ModelSpec, plan: EditPlan) -> list[tuple[Site, list[Edit]]]:
    unknown = [edit.tensor for edit in plan.edits if edit.tensor not in spec.owners]
    if unknown:
        raise PlanError(f"the plan does not fit this model: {spec.why_unknown(unknown[0])}")
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


Change = Callable[[torch.Tensor, torch.Tensor, Again], torch.Tensor]


def _changes(site: Site, edits: Sequence[Edit], strength: float, device: torch.device) -> list[Change]:
    """The output ``y`` [n, out] as edits of a matrix and its bias change it.

    ``x`` [n, in] is the input. Both are float32. Scales come first: ``R W C x + B A x``.
    """
    made: list[Change] = []
    scales = [scale.scaled(strength) for edit in edits for scale in scales_of(edit)]
    for columns in (one.factors.to(device, torch.float32) for one in scales if one.axis == "columns"):
        made.append(lambda x, y, again, columns=columns: again(x * columns))  # type: ignore[misc]
    gain = _output_gain(site, [one for one in scales if one.axis != "columns"])
    if gain is not None:
        gain = gain.to(device, torch.float32)
        made.append(lambda x, y, again: y * gain)
    for edit in edits:
        addition = addition_of(edit)
        if isinstance(addition, LowRank):
            a, b = (strength * addition.A).to(device).T, addition.B.to(device).T
            made.append(lambda x, y, again, a=a, b=b: y + (x @ a) @ b)  # type: ignore[misc]
        elif isinstance(addition, Bias):
            delta = (strength * addition.delta).to(device)
            made.append(lambda x, y, again, delta=delta: y + delta)  # type: ignore[misc]
        elif isinstance(edit, Assign):
            raise PlanError(f"the plan sets rows of {edit.tensor}, which is not a router")
    return made


def _output_gain(site: Site, scales: Sequence[Scale]) -> torch.Tensor | None:
    """The factor of each output, or one of all, float64. Raises PlanError where matrix and bias have different ones."""
    if not scales:
        return None
    names = [name for name in (site.matrix, site.bias_vector) if name]
    gains = {name: torch.ones(1, dtype=torch.float64) for name in names}
    for one in scales:
        gains[one.tensor] = gains[one.tensor] * one.factors
    first, last = gains[names[0]], gains[names[-1]]
    if first.shape != last.shape or not torch.equal(first, last):
        alone = ", ".join(sorted({one.tensor for one in scales}))
        raise PlanError(
            f"the plan scales {alone} alone; expected one gain, or one of each row, for {', '.join(sorted(names))}"
        )
    return first


def _widening(inputs: Sequence[tuple[Site, Sequence[Change]]]) -> Widen:
    """What edits of an expert's input matrices make of their outputs, which lie side by side."""

    def widen(x: torch.Tensor, wide: torch.Tensor, again: Again) -> torch.Tensor:
        wide = wide.clone()
        for site, changes in inputs:
            # a gate comes first; an expert without one has the other matrix alone
            first = wide.shape[-1] - site.out_features if site.role is MatrixRole.UP else 0
            columns = slice(first, first + site.out_features)
            y = wide[..., columns]
            for change in changes:
                y = change(x, y, _columns_of(again, columns))
            wide[..., columns] = y
        return wide

    return widen


def _columns_of(again: Again, columns: slice) -> Again:
    return lambda x: again(x)[..., columns]


def _modules(
    loaded: LoadedModel, site: Site, edits: list[Edit]
) -> Iterator[tuple[Any, list[Edit], tuple[int, int] | None]]:
    """The modules that hold a site's rows, each with its part of the edits.

    Also the part of a module's output that is the site's.
    """
    if not site.modules:
        yield loaded.module(site), edits, site.output_part
        return
    first = 0
    for name in site.modules:
        module = loaded.model.get_submodule(name)
        rows = slice(first, first + module.weight.shape[0])
        first = rows.stop
        yield module, [_of_rows(edit, rows) for edit in edits], None


def _of_rows(edit: Edit, rows: slice) -> Edit:
    """An edit's part in some rows of its matrix."""
    if isinstance(edit, ScaleAdd):
        scales = tuple(_scale_of_rows(one, rows) for one in edit.scales)
        return replace(edit, scales=scales, added=None if edit.added is None else _added_to_rows(edit.added, rows))
    if isinstance(edit, Scale):
        return _scale_of_rows(edit, rows)
    return edit if isinstance(edit, Assign) else _added_to_rows(edit, rows)


def _scale_of_rows(edit: Scale, rows: slice) -> Scale:
    return replace(edit, factors=edit.factors[rows]) if edit.axis == "rows" else edit


def _added_to_rows(edit: LowRank | Bias, rows: slice) -> LowRank | Bias:
    return replace(edit, B=edit.B[rows]) if isinstance(edit, LowRank) else replace(edit, delta=edit.delta[rows])


def _changing(module: Any, changes: Mapping[int | None, Sequence[Change]]) -> Visit:
    def visit(routed: Routed) -> torch.Tensor | None:
        if routed.expert not in changes:
            return None

        def again(x: torch.Tensor) -> torch.Tensor:
            return expert_modules.output(module, x.to(routed.inner.dtype), routed.expert).float()

        x, y = routed.inner.float(), routed.output.float()
        for change in changes[routed.expert]:
            y = change(x, y, again)
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


def _linear_hook(
    site: Site, edits: list[Edit], strength: float, device: torch.device, part: tuple[int, int] | None
) -> Callable[..., torch.Tensor]:
    changes = _changes(site, edits, strength, device)

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        def again(x: torch.Tensor) -> torch.Tensor:
            # forward, not a call: this hook runs once
            y: torch.Tensor = module.forward(x.to(inputs[0].device, inputs[0].dtype)).to(output.device, torch.float32)
            return y if part is None else y.chunk(part[1], dim=-1)[part[0]]

        # of a model on several devices a hook sees the input before it was moved
        x, y = inputs[0].to(output.device, torch.float32), output.to(torch.float32)
        if part is not None:
            whole, y = list(y.chunk(part[1], dim=-1)), y.chunk(part[1], dim=-1)[part[0]]
        for change in changes:
            y = change(x, y, again)
        if part is not None:
            whole[part[0]] = y
            y = torch.cat(whole, dim=-1)
        return y.to(output.dtype)

    return hook


def _embedding_hook(
    site: Site, edits: list[Edit], strength: float, device: torch.device
) -> Callable[..., torch.Tensor]:
    additions = [one for one in map(addition_of, edits) if isinstance(one, LowRank)]
    pairs = [((strength * one.A).to(device).T, one.B.to(device).T) for one in additions]
    scales = [scale.scaled(strength) for edit in edits for scale in scales_of(edit)]

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # some families scale the embedding's rows inside the module
        scale = float(getattr(module, "embed_scale", 1.0))
        for one in scales:
            factors = one.factors.to(output.device, torch.float32)
            output = (output * (factors[inputs[0]][..., None] if one.axis == "columns" else factors)).to(output.dtype)
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
