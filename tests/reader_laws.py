"""What must be true of the readers of any model: each is its module, reads what it says, and there are no others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from family_models import CONTEXTS

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.stream import block_scale
from steer2edit.checkpoint import Checkpoint
from steer2edit.lowering import adapter_refusal
from steer2edit.plan import Base, Bias, Edit, EditPlan, LowRank
from steer2edit.runtime.model import LoadedModel

PAST_THE_MODULE = "dt_proj"
"""Mamba's numbers that kernels read without calling the module: no hook would notice an edit, and they are not described."""


def check_readers(checkpoint: Checkpoint, loaded: LoadedModel) -> None:
    """All the laws on one tiny model, which stays as it is."""
    spec = loaded.spec
    assert not [name for name in spec.undescribed if not name.endswith(f"{PAST_THE_MODULE}.weight")]
    assert len({site.key for site in (*spec.sites, *spec.readers)}) == len(spec.sites) + len(spec.readers)
    for site in spec.readers:
        matrix = checkpoint.read(site.locate(checkpoint)).float()
        matrix = matrix if site.orientation == "out_in" else matrix.T
        assert matrix.shape == (site.out_features, site.in_features), site
        assert torch.equal(held(loaded, site), matrix), f"{site.tensor} is not {site.module}"
        assert site.matrix in spec.owners and (site.bias is None or site.bias_vector in spec.owners)
    _every_matrix_is_a_site(loaded)
    _nothing_is_read_beside_them(checkpoint, loaded)
    _norms_are_before_them(checkpoint, loaded)


def held(loaded: LoadedModel, site: Site) -> torch.Tensor:
    """A reader's matrix as transformers holds it, [out, in]."""
    if site.expert is not None:
        return _held_by_experts(loaded, site)
    if site.modules:
        return torch.cat([loaded.model.get_submodule(one).weight for one in site.modules])
    if site.role is MatrixRole.ROUTER:
        module = loaded.module(site)
        shape = (site.out_features, site.in_features)
        return torch.as_tensor(next(p for p in module.parameters() if p.shape == shape))
    weight: torch.Tensor = loaded.module(site).weight
    if site.output_part is not None:
        which, count = site.output_part
        return torch.as_tensor(weight.chunk(count)[which])
    return weight if site.orientation == "out_in" else weight.T


def _held_by_experts(loaded: LoadedModel, site: Site) -> torch.Tensor:
    module: Any = loaded.module(site)
    expert = site.expert
    assert expert is not None
    if hasattr(module, "mlp"):  # DBRX stacks its experts
        rows = slice(expert * site.out_features, (expert + 1) * site.out_features)
        return torch.as_tensor((module.mlp.w1 if site.role is MatrixRole.GATE else module.mlp.v1)[rows])
    wide: torch.Tensor = (module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj)[expert]
    wide = wide if wide.shape[1] == site.in_features else wide.T
    if site.role is MatrixRole.GATE_UP or wide.shape[0] == site.out_features:
        return wide
    return wide.chunk(2)[0 if site.role is MatrixRole.GATE else 1]


def _modules(loaded: LoadedModel, site: Site) -> list[Any]:
    if site.role is MatrixRole.ROUTER:
        return [loaded.model.get_submodule(loaded.spec.router(site.layer).router_module)]
    return [loaded.model.get_submodule(one) for one in site.modules] or [loaded.module(site)]


def _blocks(spec: ModelSpec, loaded: LoadedModel) -> list[Any]:
    return [loaded.model.get_submodule(f"{spec.block_modules}{layer}") for layer in range(spec.layers)]


def _every_matrix_is_a_site(loaded: LoadedModel) -> None:
    """What training with PEFT's ``all-linear`` may change inside the blocks can be part of a plan."""
    spec = loaded.spec
    ours = {id(module) for site in (*spec.sites, *spec.readers) for module in _modules(loaded, site)}
    linear = {
        name: module
        for block in _blocks(spec, loaded)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ in ("Conv1D", "FalconLinear")
        if not name.endswith(PAST_THE_MODULE)
    }
    inside_routers = {id(one) for r in spec.routers for one in loaded.model.get_submodule(r.router_module).modules()}
    assert not [name for name, module in linear.items() if id(module) not in ours | inside_routers]


def _nothing_is_read_beside_them(checkpoint: Checkpoint, loaded: LoadedModel) -> None:
    """With the input of every reader zeroed, no block writes anything that depends on the stream."""
    spec = loaded.spec
    readers = [site for site in spec.readers if site.reads != "inside" and site.role is not MatrixRole.UNEMBED]
    assert {site.layer for site in readers} == set(range(spec.layers))

    def silence(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (torch.zeros_like(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: torch.zeros_like(kwargs[first])}

    plain, silent = _writes(checkpoint, loaded), None
    with ExitStack() as stack:
        for module in {id(one): one for site in readers for one in _modules(loaded, site)}.values():
            stack.callback(module.register_forward_pre_hook(silence, with_kwargs=True).remove)
        silent = _writes(checkpoint, loaded)
    for before, after in zip(plain, silent, strict=True):
        assert (before[0] - before[1]).abs().max() > 1e-4
        assert torch.allclose(after[0], after[1], atol=1e-6 * float(after.abs().max() + 1))


def _writes(checkpoint: Checkpoint, loaded: LoadedModel) -> list[torch.Tensor]:
    """What each block adds to the stream in two contexts, [2, tokens, hidden], both given the same per-layer inputs."""
    found: list[torch.Tensor] = []

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        given = output[0] if isinstance(output, tuple) else output
        found.append(given / block_scale(checkpoint, loaded.spec, len(found)) - stream)

    with ExitStack() as stack, torch.inference_mode():
        for block in _blocks(loaded.spec, loaded):
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        loaded.model(input_ids=CONTEXTS, use_cache=False)
    return found


def _norms_are_before_them(checkpoint: Checkpoint, loaded: LoadedModel) -> None:
    """A reader's input is the output of its norm, times a number at most; and the norm's gain is the one that is said."""
    sites = [site for site in loaded.spec.readers if site.norm_before is not None]
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(id(module), args[0] if args else next(iter(kwargs.values())))

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args, output: outputs.__setitem__(name, (args[0], output))

    modules = {site.key: _modules(loaded, site)[0] for site in loaded.spec.readers}
    norms = {site.norm_before.module for site in sites if site.norm_before is not None and site.norm_before.module}
    with ExitStack() as stack, torch.inference_mode():
        for module in {id(one): one for one in modules.values()}.values():
            stack.callback(module.register_forward_pre_hook(seen, with_kwargs=True).remove)
        for name in norms:
            stack.callback(loaded.model.get_submodule(name).register_forward_hook(keep(name)).remove)
        loaded.model(input_ids=CONTEXTS, use_cache=False)
    # kernels that read a matrix past its module would not notice a hook on it
    assert not [site.tensor for site in loaded.spec.readers if id(modules[site.key]) not in inputs]
    for site in sites:
        norm, x = site.norm_before, inputs[id(modules[site.key])]
        assert norm is not None
        if site.role is MatrixRole.UNEMBED:
            continue
        y = outputs[norm.module][1]
        if x.shape.numel() != y.shape.numel():  # Llama 4 gives each expert all tokens, weighted by its scores
            assert x.shape.numel() == y.shape.numel() * loaded.spec.router(site.layer).experts
            continue
        x, y = x.reshape(-1), y.reshape(-1)
        assert torch.allclose(x, y * ((x @ y) / (y @ y)), atol=1e-6), site
    for name, (x, y) in outputs.items():
        norm = next(s.norm_before for s in sites if s.norm_before is not None and s.norm_before.module == name)
        gain = torch.ones(x.shape[-1])
        if norm.tensor is not None:
            gain = checkpoint.read(norm.tensor).float() + norm.offset
        bias = 0 if norm.bias is None else checkpoint.read(norm.bias).float()
        n = (y - bias) / gain
        likeness = [torch.cosine_similarity(n, one, dim=-1).min() for one in (x, x - x.mean(dim=-1, keepdim=True))]
        assert max(likeness) > 1 - 1e-5, norm


def reader_plan(checkpoint: Checkpoint, spec: ModelSpec, size: float = 0.3) -> EditPlan:
    """A random rank-1 edit of every reader, of ``size`` times the size of its input, and of every second one's bias."""
    generator = torch.Generator().manual_seed(1)
    edits: list[Edit] = []
    for index, site in enumerate(spec.readers):
        b, a = (torch.randn(n, generator=generator) for n in (site.out_features, site.in_features))
        edits.append(LowRank(site.matrix, (b / b.norm())[:, None], size * (a / a.norm())[None]))
        if site.bias_vector is not None and site.role is not MatrixRole.ROUTER and index % 2:
            edits.append(Bias(site.bias_vector, 0.1 * b / b.norm()))
    return EditPlan(Base.of(checkpoint), tuple(edits))


def single_readers(checkpoint: Checkpoint, spec: ModelSpec) -> list[LowRank]:
    """A random rank-1 edit of every reader that an adapter carries."""
    edits = (edit for edit in reader_plan(checkpoint, spec).edits if isinstance(edit, LowRank))
    return [edit for edit in edits if not adapter_refusal(edit, spec.owners[edit.tensor])]
