"""From config.json and the tensor index to a ModelSpec: every residual writer, its orientation and components.

No model code is imported and no weight is read. What is not understood is an error: a layer whose writers were
not all found, or a tensor that looks like a writer and belongs to no site, stops the compile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steer2edit.architecture.carriers import BiasSetting, bias_settings
from steer2edit.architecture.config import (
    HIDDEN,
    head_count,
    head_size,
    integer,
    layer_count,
    layer_values,
    number,
    text_config,
)
from steer2edit.architecture.coverage import (
    around,
    head_tensor,
    is_tied,
    key_shapes,
    left_over,
    missing_around,
    missing_in_blocks,
)
from steer2edit.architecture.family import Family, Orientation, Part
from steer2edit.architecture.find_family import family_of, find_family
from steer2edit.architecture.matrices import check_matrix, embedding_site, in_features
from steer2edit.architecture.read_readers import ReaderFinder
from steer2edit.architecture.refusals import refuse_unfit
from steer2edit.architecture.routers import Router, read_router
from steer2edit.architecture.sites import MatrixRole, ModelSpec, Norm, Site, part_of
from steer2edit.architecture.wrappers import FLAT
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.errors import ArchitectureError, listing

_NAMED = 100  # tensors named in one error


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Find every residual writer and router of a checkpoint.

    Raises ArchitectureError, with all that is missing or left over, for quantised checkpoints, families known to be
    unfit, and layouts that no family describes.
    """
    config = checkpoint.config
    text = text_config(config)
    model_type, values = text.model_type, text.values
    refuse_unfit(checkpoint, (model_type, str(config.get("model_type"))), values)
    by_type = family_of(model_type)
    hidden, layers = integer(values, *HIDDEN), layer_count(values)
    heads = head_count(values, optional=by_type is not None and by_type.partial)
    if layers > len(checkpoint.tensors):
        raise ArchitectureError(
            f"config.json gives {checkpoint.name} {layers} layers, its files hold {len(checkpoint.tensors)} tensors"
        )

    family, prefix, module = find_family(checkpoint, model_type, layers, text.nested or model_type in FLAT)
    settings = bias_settings(checkpoint, model_type, text.given, prefix, layers)
    described = next((one for one in (str(config.get("model_type")), model_type) if family_of(one) is not None), None)
    finder = ReaderFinder(checkpoint, family, described, prefix, module, hidden)
    reader = _Reader(checkpoint, values, family, prefix, module, hidden, heads, settings, finder)
    for layer in range(layers):
        reader.layer(layer)
    embedding, problems = embedding_site(checkpoint, family, prefix, module, hidden)
    problems = [
        *problems,
        *reader.problems,
        *key_shapes(checkpoint, text, prefix, layers),
        *missing_in_blocks(checkpoint, prefix, reader.sites, family, values, layers),
        *missing_around(checkpoint, prefix, family, config, model_type),
        *left_over(checkpoint, prefix, layers, reader.claimed),
    ]
    if problems:
        if text.filled:
            sizes = ", ".join(f"{name} {value}" for name, value in text.filled.items())
            problems.append(f"config.json leaves out what its class sets by default: {sizes}")
        raise ArchitectureError(
            f"{checkpoint.name} ({model_type or 'no model_type'}) does not match the {family.name} layout:\n"
            f"{listing(problems, _NAMED)}"
        )
    tied = is_tied(checkpoint, family, config)
    norm = None if family.final_norm is None else f"{around(prefix)}{family.final_norm}.weight"
    head = None if tied else finder.unembedding(head_tensor(checkpoint, family), norm, layers - 1)
    return ModelSpec(
        model_type=model_type,
        family=family.name,
        hidden_size=hidden,
        layers=layers,
        sites=tuple(reader.sites),
        embedding=embedding,
        tied_embeddings=tied,
        block_modules=module,
        routers=tuple(reader.routers),
        frozen=tuple(reader.frozen),
        bias_settings=settings,
        readers=(*reader.readers, *((head,) if head is not None else ())),
        undescribed=tuple(reader.undescribed),
    )


class _Reader:
    """Collects the writers of one checkpoint block by block, and everything that is wrong with them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        values: Mapping[str, Any],
        family: Family,
        prefix: str,
        module: str,
        hidden: int,
        heads: int,
        settings: tuple[BiasSetting, ...],
        finder: ReaderFinder,
    ) -> None:
        self.checkpoint, self.values, self.family = checkpoint, values, family
        self.creatable = {name for setting in settings for name in setting.creates}
        self.prefix, self.module, self.hidden, self.heads, self.finder = prefix, module, hidden, heads, finder
        self.sites: list[Site] = []
        self.routers: list[Router] = []
        self.problems: list[str] = []
        self.frozen: list[str] = []
        self.readers: list[Site] = []
        self.undescribed: list[str] = []
        self.claimed: set[str] = set()

    def layer(self, layer: int) -> None:
        """Find the writers of a block: attention or another mixer, then an MLP or experts."""
        family, before = self.family, len(self.sites)
        for leaf in family.mixers:
            self._writer(
                layer, MatrixRole.MIXER_OUT, leaf, None if family.bare_mixers else family.attn_norm, optional=True
            )
        mixed = len(self.sites) > before
        mlp_norm = None if mixed and family.bare_mixers else family.mlp_norm
        if family.attn_out not in family.mixers:
            self._writer(
                layer, MatrixRole.ATTN_OUT, family.attn_out, family.attn_norm, optional=mixed or family.partial
            )
        routed = family.mixture is not None and self._experts(layer)
        # in granite's mixtures the shared expert has the place of a dense model's MLP
        if not (routed and family.mixture and family.mixture.shared == family.mlp_out):
            self._writer(layer, MatrixRole.MLP_OUT, family.mlp_out, mlp_norm, optional=routed or family.partial)
        # configs switch the per-layer inputs off by a size of 0
        if family.per_layer_out is not None and self.values.get("hidden_size_per_layer_input") != 0:
            self._writer(layer, MatrixRole.PER_LAYER_OUT, family.per_layer_out, family.per_layer_norm)
        if len(self.sites) == before and family.partial:
            self.problems.append(f"layer {layer}: no writer was found")
        router = self.routers[-1] if routed and self.routers and self.routers[-1].layer == layer else None
        readers, undescribed = self.finder.layer(layer, self.sites[before:], router)
        self.readers += readers
        self.undescribed += undescribed

    def _writer(
        self,
        layer: int,
        role: MatrixRole,
        leaf: str,
        norm: str | None,
        *,
        first_norm: str | None = None,
        optional: bool = False,
    ) -> None:
        base, family = f"{self.prefix}{layer}.", self.family
        info = self.checkpoint.tensors.get(f"{base}{leaf}.weight")
        if info is None:
            if not optional:
                self.problems.append(f"layer {layer}: {base}{leaf}.weight is missing ({role.value})")
            return
        heads = self._heads(layer) if role is MatrixRole.ATTN_OUT or leaf == family.attn_out else None
        width = in_features(info, family.orientation)
        if leaf == family.attn_out and leaf in family.mixers:
            # one name for attention and for what stands in its place: only the widths tell them apart
            role, heads = (
                (MatrixRole.ATTN_OUT, heads)
                if width == self._heads(layer) * self._head_size(layer)
                else (MatrixRole.MIXER_OUT, None)
            )
        bias = f"{base}{leaf}.bias"
        site = Site(
            role=role,
            layer=layer,
            tensor=info.name,
            module=f"{self.module}{layer}.{family.module(leaf)}",
            orientation=family.orientation,
            out_features=self.hidden,
            in_features=width,
            heads=heads,
            bias=bias if bias in self.checkpoint.tensors else None,
            # a shared expert's output may be weighted by the token
            new_bias=bias
            if bias in self.creatable and norm is None and role is not MatrixRole.SHARED_EXPERT_OUT
            else None,
            norm=self._norm(layer, leaf, norm, first_norm),
            multiplier=self._multiplier(role, layer),
            block_scale=self._block_scale(layer),
        )
        self._keep(site, info)

    def _experts(self, layer: int) -> bool:
        """Claim a block's experts and router, if it has them."""
        mixture = self.family.mixture
        assert mixture is not None
        base = f"{self.prefix}{layer}."
        router, problems = read_router(self.checkpoint, self.values, mixture, base, f"{self.module}{layer}.", layer)
        self.problems += problems
        if router is None:
            return bool(problems)
        self.routers.append(router)
        norm = mixture.norm or self.family.mlp_norm
        for expert in range(router.experts):
            name = f"{base}{mixture.output.format(e=expert)}"
            info = self.checkpoint.tensors.get(name)
            if info is None and f"{name}_blocks" in self.checkpoint.tensors:
                self.frozen.append(f"{name}_blocks")
                break
            if info is not None and info.packed is not None:
                # how an engine runs them is its own affair: no module has one of them alone
                self.frozen.append(name)
                self.claimed.add(name)
                continue
            if info is None:
                self.problems.append(f"layer {layer}: {name} is missing (expert {expert} of {router.experts})")
                if mixture.layout != "separate":
                    break
                continue
            part = None if mixture.layout == "separate" else (expert, router.experts)
            if part is not None and (not info.shape or info.shape[0] % router.experts):
                self.problems.append(
                    f"{name} has the shape {list(info.shape)}; expected {router.experts} experts on axis 0"
                )
                break
            orientation: Orientation = "out_in" if mixture.layout in ("separate", "out_in") else "in_out"
            output_bias = mixture.output_bias and f"{base}{mixture.output_bias}"
            site = Site(
                role=MatrixRole.EXPERT_OUT,
                layer=layer,
                tensor=name,
                module=router.experts_module,
                orientation=orientation,
                out_features=self.hidden,
                in_features=in_features(part_of(info, part), orientation),
                bias=output_bias if output_bias in self.checkpoint.tensors else None,
                norm=self._norm(layer, "the experts", norm, mixture.routed_norm),
                expert=expert,
                part=part,
                multiplier=self._multiplier(MatrixRole.EXPERT_OUT, layer),
                block_scale=self._block_scale(layer),
            )
            self._keep(site, info)
        if mixture.shared is not None:
            role, first = MatrixRole.SHARED_EXPERT_OUT, mixture.shared_norm
            self._writer(layer, role, mixture.shared, norm, first_norm=first, optional=True)
        return True

    def _norm(self, layer: int, leaf: str, norm: str | None, first: str | None = None) -> Norm | None:
        if norm is None:
            return None
        earlier = None if first is None else self._vector(layer, first, f"the first norm after {leaf}")
        name = f"{self.prefix}{layer}.{norm}.weight"
        other = f"{self.prefix}{layer}.{self.family.norm_aliases.get(norm, norm)}.weight"
        if name not in self.checkpoint.tensors and other in self.checkpoint.tensors:
            name = other
        if name not in self.checkpoint.tensors:
            self.problems.append(f"layer {layer}: {name} is missing (the norm after {leaf})")
        return Norm(name, self.family.norm_offset, earlier)

    def _block_scale(self, layer: int) -> str | float | None:
        if self.family.depth_scaled:
            # the block's two additions, the 2(l + 1)-th and the next, and so on: one factor on all that the block was given
            return math.sqrt((2 * layer + 1) / (2 * layer + 3))
        scale = self.family.block_scale
        return None if scale is None else self._vector(layer, scale, "the factor of the whole block", suffix="")

    def _vector(self, layer: int, leaf: str, what: str, suffix: str = ".weight") -> str:
        name = f"{self.prefix}{layer}.{leaf}{suffix}"
        problem = f"layer {layer}: {name} is missing ({what})"
        if name not in self.checkpoint.tensors and problem not in self.problems:
            self.problems.append(problem)
        return name

    def _keep(self, site: Site, info: TensorInfo) -> None:
        self.claimed.add(info.name)
        self.sites.append(site)
        self.problems += check_matrix(site, self.checkpoint, self._head_size(site.layer))

    def _multiplier(self, role: MatrixRole, layer: int) -> float:
        """What the family multiplies a writer's output by."""
        if self.family.depth_scaled:
            return 1 / math.sqrt(2 * layer + 1)
        parts: dict[MatrixRole, Part] = {
            MatrixRole.ATTN_OUT: "attention",
            MatrixRole.MIXER_OUT: "mixer",
            MatrixRole.EXPERT_OUT: "experts" if "experts" in self.family.multipliers else "mlp",
        }
        multiplier = self.family.multipliers.get(parts.get(role, "mlp"))
        if multiplier is None or self.values.get(multiplier.key) is None:
            return 1.0
        factor = number(self.values, multiplier.key, multiplier.item)
        return factor / math.sqrt(layer_count(self.values)) if multiplier.by_depth else factor

    def _head_size(self, layer: int) -> int:
        return head_size(layer_values(self.values, layer), self.hidden, self._heads(layer))

    def _heads(self, layer: int) -> int:
        own = layer_values(self.values, layer)
        return self.heads if own is self.values else head_count(own, optional=True)
