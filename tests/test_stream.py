"""What a block adds to the residual stream is the sum of what its writers output, through their norms and multipliers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import family_config
from family_models import CONTEXTS
from mixture_models import MIXTURE_TYPES, mixture_config, save_mixture
from test_families import CAUSAL

from steer2edit.architecture import MatrixRole, ModelSpec, Site, read_spec
from steer2edit.architecture.config import class_defaults
from steer2edit.architecture.find_family import KNOWN, family_of
from steer2edit.architecture.stream import block_scale, factor
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import ArchitectureError
from steer2edit.runtime.hooks import stream_shifted
from steer2edit.runtime.model import LoadedModel, load_weights

# settings whose names say that they multiply something
_FACTOR = re.compile(r"multiplier|scale_depth|residual_scale|branch_scale|out_scale|layer_scale")


def factors(config: Any) -> dict[str, Any]:
    """Every setting of a config that multiplies something, each with another value than 1, and than the others."""
    values = (0.5 + 0.07 * i for i in range(100))
    changes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if _FACTOR.search(name) and "dim" not in name:
            changes[name] = [next(values) for _ in value] if isinstance(value, list) else next(values)
    return changes


def build(folder: Path, model_type: str, dense: bool = True) -> Path:
    make, save = (family_config, save_tiny) if dense else (mixture_config, save_mixture)
    return save(folder, make(model_type, **factors(make(model_type))))


def outputs(model: Any, names: set[str]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, first input and output of the modules called so, in one pass over two rows of tokens."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = args[0] if args else kwargs["hidden_states"]
            # copied: falcon adds to it in place
            seen[name] = (first.clone(), (output[0] if isinstance(output, tuple) else output).clone())

        return note

    with ExitStack() as stack, torch.inference_mode():
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        model(input_ids=CONTEXTS, use_cache=False)
    yield from ((name, before, after) for name, (before, after) in seen.items())


def last_module(spec: ModelSpec, site: Site) -> str:
    """The module whose output joins the stream: the norm after a writer, the module that sums the experts, or the writer."""
    family, block = family_of(spec.model_type), f"{spec.block_modules}{site.layer}."
    assert family is not None
    mixture = family.mixture
    if mixture is not None and site.role in (MatrixRole.EXPERT_OUT, MatrixRole.SHARED_EXPERT_OUT):
        experts = f"{block}{mixture.block}"
        # a norm that only mixtures have is inside that module
        if mixture.norm is not None or site.norm is None:
            return experts if site.module.startswith(f"{experts}.") else site.module
    leaf = family.attn_norm if site.role.kind is MatrixRole.ATTN_OUT else family.mlp_norm
    leaf = family.per_layer_norm if site.role is MatrixRole.PER_LAYER_OUT else leaf
    return site.module if site.norm is None else f"{block}{family.module(leaf or '')}"


def unexplained(folder: Path, spec: ModelSpec) -> float:
    """The largest part of what a block adds that its writers' outputs do not explain, relative to what it adds.

    Of a block that multiplies its whole stream by a number: what it adds before that.
    """
    model, checkpoint = load_weights(folder), open_checkpoint(folder)
    scales = {layer: block_scale(checkpoint, spec, layer) for layer in range(spec.layers)}
    parts = {(site.layer, last_module(spec, site)): site.multiplier for site in spec.sites}
    blocks = [f"{spec.block_modules}{layer}" for layer in range(spec.layers)]
    results = {name: (before, after) for name, before, after in outputs(model, {*blocks, *(name for _, name in parts)})}
    worst = 0.0
    for layer, block in enumerate(blocks):
        before, after = results[block]
        after = after / scales[layer]
        terms = [results[name][1].reshape(before.shape) * f for (at, name), f in parts.items() if at == layer]
        rest = after - before - torch.stack(terms).sum(0)
        worst = max(worst, float(rest.abs().max() / (after - before).abs().max()))
    return worst


@pytest.mark.parametrize(
    ("model_type", "dense"), [*((name, True) for name in CAUSAL), *((name, False) for name in MIXTURE_TYPES)]
)
def test_a_block_adds_what_its_writers_output_times_their_multipliers(
    model_type: str, dense: bool, tmp_path: Path
) -> None:
    folder = build(tmp_path / "m", model_type, dense)
    spec = read_spec(open_checkpoint(folder))
    assert unexplained(folder, spec) < 1e-4
    family = family_of(model_type)
    assert family is not None
    if family.multipliers.keys() - {"experts"}:
        plain = replace(spec, sites=tuple(replace(site, multiplier=1.0) for site in spec.sites))
        assert unexplained(folder, plain) > 1e-2


def test_experts_may_have_a_factor_of_their_own(tmp_path: Path) -> None:
    """MiniMax M3 multiplies what its routed experts write, and not what the shared one does."""
    folder = build(tmp_path / "m", "minimax_m3_vl_text", dense=False)
    spec = read_spec(open_checkpoint(folder))
    assert {site.multiplier for site in spec.sites if site.role is not MatrixRole.EXPERT_OUT} == {1.0}
    for router in spec.routers:
        block = router.experts_module.rpartition(".")[0]
        shared = spec.site(f"shared_expert_out.{router.layer}").module
        given = {
            name: after for name, _, after in outputs(load_weights(folder), {block, shared, router.experts_module})
        }
        experts = given[router.experts_module].view_as(given[block])
        factor = spec.site(f"expert_out.{router.layer}.0").multiplier
        assert factor != 1
        assert torch.allclose(given[block], given[shared].view_as(experts) + factor * experts, atol=1e-5)


def test_a_block_multiplies_all_that_comes_through_it_by_its_own_number(tmp_path: Path) -> None:
    """A vector that joins the stream after block 0 leaves a silent block 1 as many times as large as that block's factor."""
    folder = build(tmp_path / "m", "gemma4_text")
    checkpoint = open_checkpoint(folder)
    loaded = LoadedModel(load_weights(folder), None, read_spec(checkpoint))
    for site in loaded.spec.sites:
        loaded.module(site).weight.zero_()
    block, v = f"{loaded.spec.block_modules}1", torch.randn(loaded.spec.hidden_size)

    def after() -> torch.Tensor:
        ((_, _, stream),) = outputs(loaded.model, {block})
        return stream

    before = after()
    with stream_shifted(loaded, {0: v}):
        moved = after() - before
    assert torch.allclose(moved, (block_scale(checkpoint, loaded.spec, 1) * v).expand_as(moved), atol=1e-5)


def test_a_writer_has_to_write_a_vector_divided_by_its_blocks_number(
    tmp_path: Path, statistics_of: Callable[..., Any]
) -> None:
    folder = build(tmp_path / "m", "gemma4_unified_text")
    checkpoint, statistics = open_checkpoint(folder), statistics_of(folder)
    spec = read_spec(checkpoint)
    vectors = Vectors({f"residual.{layer}": torch.ones(spec.hidden_size) for layer in range(spec.layers)})
    scaled = substituted(vectors, statistics, checkpoint, spec)
    plain = replace(spec, sites=tuple(replace(site, block_scale=None) for site in spec.sites))
    for site in spec.sites:
        expected = substituted(vectors, statistics, checkpoint, plain).difference(site.vector_key)
        found = scaled.difference(site.vector_key) * factor(checkpoint, site)
        assert torch.allclose(found, expected) and factor(checkpoint, site) != 1


def test_a_multiplier_is_read_where_the_language_model_is_described(tmp_path: Path) -> None:
    """In a multimodal model, whose own config has none."""
    folder = build(tmp_path / "m", "granite")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next", "text_config": config}))
    assert {site.multiplier for site in read_spec(open_checkpoint(folder)).sites} == {config["residual_multiplier"]}


def test_a_multiplier_that_the_config_leaves_out_is_its_class_default(tmp_path: Path) -> None:
    folder = build(tmp_path / "m", "minicpm3")
    config = json.loads((folder / "config.json").read_text())
    del config["scale_depth"]
    (folder / "config.json").write_text(json.dumps(config))
    assert {site.multiplier for site in read_spec(open_checkpoint(folder)).sites} == {1.4 / 2**0.5}


@pytest.mark.parametrize("value", ["0.5", [0.5], {}, True, float("inf")])
def test_a_multiplier_that_is_not_a_number_is_refused(tmp_path: Path, value: Any) -> None:
    folder = build(tmp_path / "m", "granite")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "residual_multiplier": value}))
    with pytest.raises(ArchitectureError, match="residual_multiplier"):
        read_spec(open_checkpoint(folder))


def test_every_multiplier_has_its_class_default() -> None:
    for family in KNOWN:
        for name in family.model_types:
            assert {one.key for one in family.multipliers.values()} <= class_defaults(name).keys()
