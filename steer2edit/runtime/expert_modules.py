"""A layer's experts as they run in transformers: what each is given and gives, seen and changed from outside.

Transformers holds the experts of a layer in one module, called with the tokens, the experts chosen for each and their
weights. Here its forward is replaced, for a while, by one that does the same expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from steer2edit.architecture.routers import Router
from steer2edit.errors import ArchitectureError


@dataclass(frozen=True)
class Routed:
    """What one ``expert`` did in a forward pass.

    ``tokens`` [n] are rows of the flattened batch, ``weights`` [n] what the expert's output is multiplied by. ``inner`` [n, in]
    is the input of its output matrix, ``output`` [n, hidden] the output, not weighted yet.
    """

    expert: int
    tokens: torch.Tensor
    weights: torch.Tensor
    inner: torch.Tensor
    output: torch.Tensor


Visit = Callable[[Routed], torch.Tensor | None]
Again = Callable[[torch.Tensor], torch.Tensor]
"""The output, float32, for another input, float32."""
Widen = Callable[[torch.Tensor, torch.Tensor, Again], torch.Tensor]
"""Changes what an expert's input matrices give, the gate's first: ``(x [n, hidden], wide [n, width], again) -> wide``."""
Decide = Callable[[torch.Tensor, torch.Tensor], None]


@contextmanager
def visiting(
    model: Any, router: Router, visit: Visit, widened: Mapping[int | None, Widen] = MappingProxyType({})
) -> Iterator[None]:
    """Within the block, ``visit`` sees every expert of the layer that has tokens.

    What it returns is the output instead. ``widened`` changes what the input matrices of some experts give.
    """
    module = experts_module(model, router)
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise ArchitectureError(
            f"the experts of layer {router.layer} are offloaded, and cannot be seen one by one: capture with --by-layer, or "
            "place them on a device"
        )
    with ExitStack() as stack:
        run = _llama4(model, router, stack) if _scales_inputs(module) else _indexed
        stack.enter_context(_replaced(module, lambda *args, **kwargs: run(module, visit, widened, *args, **kwargs)))
        yield


@contextmanager
def deciding(model: Any, router: Router, decide: Decide) -> Iterator[None]:
    """Within the block ``decide`` is called with each pass's choices: experts [tokens, k] and their weights [tokens, k]."""
    module = experts_module(model, router)
    if _scales_inputs(module):

        def seen(_module: Any, _inputs: Any, output: Any) -> None:
            weights, chosen = output[0].topk(router.top_k, dim=-1)
            decide(chosen, weights)

        handle = model.get_submodule(router.router_module).register_forward_hook(seen)
    else:

        def given(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            decide(args[1], args[2])

        handle = module.register_forward_pre_hook(given)
    try:
        yield
    finally:
        handle.remove()


def combined(model: Any, router: Router, given: torch.Tensor) -> torch.Tensor:
    """The routed experts' sum, [tokens, hidden], of what their module returned."""
    if _scales_inputs(experts_module(model, router)):
        return given.view(router.experts, -1, given.shape[-1]).sum(dim=0)
    return given


@contextmanager
def router_inputs(model: Any, router: Router, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within the block ``see`` is called with what the router's matrix is multiplied by, [tokens, hidden]."""

    def given(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        see(args[0].flatten(0, -2))

    handle = model.get_submodule(router.input_module).register_forward_pre_hook(given)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without(model: Any, router: Router, experts: Sequence[int], *, absent: bool) -> Iterator[None]:
    """A reference for masks: the layer's router can't select ``experts``.

    ``absent``: their logits are -inf before scores are made of them, as if they did not exist. Otherwise the scores stay
    as they are, and the experts are passed over in the selection (*unselected*). They differ where a softmax over all
    experts is not normalised again over the selected ones.
    """
    module = model.get_submodule(router.router_module)
    forward = getattr(module, _forward_name(module))
    mode = _Without(router.experts, experts, absent)

    def masked(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    with _replaced(module, masked):
        yield


def _forward_name(module: Any) -> str:
    # accelerate's forward brings the weights to the device, and then calls the module's own
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    name = _forward_name(module)
    before = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def experts_module(model: Any, router: Router) -> Any:
    """The module of a layer's experts. Raises ArchitectureError where transformers has none of that name."""
    try:
        module = model.get_submodule(router.experts_module)
    except AttributeError:
        raise ArchitectureError(
            f"transformers' {type(model).__name__} has no module {router.experts_module} for the experts of layer {router.layer}"
        ) from None
    if not (hasattr(module, "has_gate") or _is_gated(module) or hasattr(module, "mlp") or _scales_inputs(module)):
        raise ArchitectureError(
            f"this release of transformers holds the experts of layer {router.layer} in a form that is not known "
            f"({type(module).__name__}); a newer release may run them"
        )
    return module


def routing_tensor(model: Any, router: Router, *, bias: bool) -> torch.Tensor:
    """The router's matrix [experts, hidden] or its bias, as it lies in memory. Raises ArchitectureError where it is not found."""
    block, experts = router.experts_module.rpartition(".")[0], router.experts_module.rpartition(".")[2]
    module = model.get_submodule(block if bias else router.router_module)
    names = ("e_score_correction_bias", "expert_bias", "bias") if bias else ("weight",)
    held = [
        tensor
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if name.rpartition(".")[2] in names
        and not name.startswith(f"{experts}.")
        and (tensor.numel() == router.experts if bias else tensor.ndim == 2 and len(tensor) == router.experts)
    ]
    if len(held) != 1:
        raise ArchitectureError(
            f"transformers' {type(model).__name__} has {len(held)} tensors in {block} that may be "
            f"{router.bias if bias else router.tensor}; expected one"
        )
    if held[0].is_meta:
        raise ArchitectureError(
            f"{router.bias if bias else router.tensor} is offloaded, and cannot be set; load the model without --device-map"
        )
    return held[0]  # type: ignore[no-any-return]


def inner(module: Any, x: torch.Tensor, expert: int, widen: Widen | None = None) -> torch.Tensor:
    """The input of an expert's output matrix, [n, in], for tokens ``x`` [n, hidden]."""

    def wide_of(x: torch.Tensor) -> torch.Tensor:
        if hasattr(module, "mlp"):  # DBRX stacks its experts' matrices
            rows = _stacked(module, expert)
            return torch.cat((x @ module.mlp.w1[rows].T, x @ module.mlp.v1[rows].T), dim=-1)
        if _scales_inputs(module):
            return x @ module.gate_up_proj[expert]  # type: ignore[no-any-return]
        gated, biased = _has_gate(module), getattr(module, "has_bias", False)
        matrix = (module.gate_up_proj if gated else module.up_proj)[expert]
        biases = (module.gate_up_proj_bias if gated else module.up_proj_bias) if biased else None
        bias = None if biases is None else biases[expert]
        return functional.linear(x, matrix.T if _is_transposed(module) else matrix, bias)

    wide = wide_of(x)
    if widen is not None:
        wide = widen(x.float(), wide.float(), lambda other: wide_of(other.to(x.dtype)).float()).to(wide.dtype)
    if hasattr(module, "mlp"):
        gate, up = wide.chunk(2, dim=-1)
        return module.mlp.activation_fn(gate) * up  # type: ignore[no-any-return]
    if _scales_inputs(module):
        gate, up = wide.chunk(2, dim=-1)
        return up * module.act_fn(gate)  # type: ignore[no-any-return]
    return module._apply_gate(wide) if _has_gate(module) else module.act_fn(wide)  # type: ignore[no-any-return]


def output(module: Any, h: torch.Tensor, expert: int) -> torch.Tensor:
    """What an expert gives, [n, hidden], for the input ``h`` [n, in] of its output matrix."""
    if hasattr(module, "mlp"):
        return h @ module.mlp.w2[_stacked(module, expert)]  # type: ignore[no-any-return]
    if _scales_inputs(module):
        return h @ module.down_proj[expert]  # type: ignore[no-any-return]
    matrix = module.down_proj[expert]
    bias = module.down_proj_bias[expert] if getattr(module, "has_bias", False) else None
    return functional.linear(h, matrix.T if _is_transposed(module) else matrix, bias)


def _indexed(
    module: Any,
    visit: Visit,
    widened: Mapping[int | None, Widen],
    tokens: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    rows = tokens.reshape(-1, tokens.shape[-1])
    total = torch.zeros_like(rows)
    for expert in torch.bincount(chosen.flatten()).nonzero()[:, 0].tolist():
        token, slot = torch.where(chosen == expert)
        h = inner(module, rows[token], expert, widened.get(expert))
        routed = Routed(expert, token, weights[token, slot], h, output(module, h, expert))
        found = visit(routed)
        given = routed.output if found is None else found
        total.index_add_(0, token, (given * routed.weights[:, None]).to(total.dtype))
    return total.view(tokens.shape)


def _llama4(model: Any, router: Router, stack: ExitStack) -> Callable[..., torch.Tensor]:
    """Llama 4 multiplies the experts' *inputs* by the scores, and runs every expert on every token."""
    scores: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, given: Any) -> None:
        scores[:] = [given[0]]

    stack.callback(model.get_submodule(router.router_module).register_forward_hook(keep).remove)

    def run(module: Any, visit: Visit, widened: Mapping[int | None, Widen], inputs: torch.Tensor) -> torch.Tensor:
        by_expert = inputs.view(router.experts, -1, inputs.shape[-1])
        result = torch.zeros_like(by_expert)
        for expert in range(router.experts):
            token = scores[0][:, expert].nonzero()[:, 0]
            if not len(token):
                continue
            h = inner(module, by_expert[expert, token], expert, widened.get(expert))
            # the score is in the input already
            routed = Routed(expert, token, torch.ones_like(h[:, 0]), h, output(module, h, expert))
            found = visit(routed)
            result[expert, token] = (routed.output if found is None else found).to(result.dtype)
        return result.view(inputs.shape)

    return run


def _scales_inputs(module: Any) -> bool:
    return type(module).__name__.startswith("Llama4")


def _is_gated(module: Any) -> bool:
    """Whether a module is as transformers' shared code has them, but without its flags: Step 3.7's."""
    return all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "_apply_gate"))


def _has_gate(module: Any) -> bool:
    return bool(getattr(module, "has_gate", True))


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _stacked(module: Any, expert: int) -> slice:
    width = module.mlp.w2.shape[0] // module.num_experts
    return slice(expert * width, (expert + 1) * width)


class _Without(TorchFunctionMode):
    """Hide some experts from a router's top-k while its forward runs.

    What top-k looks at is -inf for them, and so are their logits if ``absent``.
    """

    def __init__(self, experts: int, masked: Sequence[int], absent: bool) -> None:
        super().__init__()
        self._experts, self._absent = experts, absent
        self._masked = torch.zeros(experts, dtype=torch.bool)
        self._masked[list(masked)] = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and self._over_experts(args[0]):
            # a score of nothing may still win by its bias
            return func(self._silenced(args[0]), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if self._absent and func is functional.linear and result.shape[-1] == self._experts:
            return self._silenced(result)
        return result

    def _over_experts(self, scores: torch.Tensor) -> bool:
        # group-limited routers rank [tokens, groups, experts of a group] first
        return scores.shape[-1] == self._experts or (
            scores.ndim == 3 and scores.shape[1] * scores.shape[2] == self._experts
        )

    def _silenced(self, values: torch.Tensor) -> torch.Tensor:
        shape = (self._experts,) if values.shape[-1] == self._experts else tuple(values.shape[1:])
        return values.masked_fill(self._masked.to(values.device).view(shape), float("-inf"))
