"""What the compiler knows of a model: its residual writers, their components, and its routers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from steer2edit.architecture.carriers import BiasSetting
from steer2edit.architecture.family import Orientation
from steer2edit.architecture.routers import Router
from steer2edit.checkpoint import Checkpoint, TensorInfo, part_name
from steer2edit.errors import ArchitectureError

DEEP = 12
"""From so many layers on the first half is left alone. Measured on 18 and 30 layers; with 6, the first ones are needed."""


class MatrixRole(str, Enum):
    """What a site is to the residual stream. A mixer is whatever stands in attention's place (Mamba, convolution)."""

    ATTN_OUT = "attn_out"
    MIXER_OUT = "mixer_out"
    MLP_OUT = "mlp_out"
    EXPERT_OUT = "expert_out"
    SHARED_EXPERT_OUT = "shared_expert_out"
    PER_LAYER_OUT = "per_layer_out"
    ROUTER = "router"
    EMBED = "embed"

    @property
    def kind(self) -> MatrixRole:
        """ATTN_OUT for all that moves information between tokens, MLP_OUT for all that works on each token by itself."""
        if self in (MatrixRole.ATTN_OUT, MatrixRole.MIXER_OUT):
            return MatrixRole.ATTN_OUT
        return self if self in (MatrixRole.EMBED, MatrixRole.ROUTER) else MatrixRole.MLP_OUT


@dataclass(frozen=True)
class Norm:
    """A norm between a writer's output and the stream; its gain is ``offset`` + the tensor's values.

    ``first`` is the tensor of another norm between the writer and this one.
    """

    tensor: str
    offset: float
    first: str | None = None


@dataclass(frozen=True)
class Site:
    """One weight matrix at the residual stream.

    ``in_features`` and ``out_features`` are those of ``y = W x`` whatever the file's ``orientation``. ``heads`` is the
    number of attention heads, each a block of ``in_features / heads`` input columns, and None elsewhere, where the
    components are single input columns. ``multiplier`` is what the model multiplies the output by (after the norm, if there is
    one) before it joins the stream. ``block_scale`` is the number by which the block multiplies its whole stream, this output
    included, at its end, or the tensor that holds the number. ``expert`` is the expert's number. Where a tensor holds several
    experts, ``part`` is ``(which, of how many)`` equal parts of its first stored axis; ``module`` is then that of all the
    experts.
    """

    role: MatrixRole
    layer: int
    tensor: str
    module: str
    orientation: Orientation
    out_features: int
    in_features: int
    heads: int | None = None
    bias: str | None = None
    new_bias: str | None = None
    norm: Norm | None = None
    expert: int | None = None
    part: tuple[int, int] | None = None
    multiplier: float = 1.0
    block_scale: str | float | None = None

    @property
    def key(self) -> str:
        """Stable name used in statistics and plans: ``attn_out.3``, ``expert_out.3.17``."""
        tail = "" if self.expert is None else f".{self.expert}"
        return f"{self.role.value}.{self.layer}{tail}"

    @property
    def vector_key(self) -> str:
        """Under which name the steering vector is kept: experts of a layer share that of their weighted sum."""
        return self.key if self.expert is None else f"experts_out.{self.layer}"

    @property
    def matrix(self) -> str:
        """What plans call the matrix: its tensor's name, with ``[3]`` for the fourth part of a tensor of several."""
        return _name(self.tensor, self.part)

    @property
    def bias_vector(self) -> str | None:
        """What plans call the bias, if there is one."""
        return None if self.bias is None else _name(self.bias, self.part)

    @property
    def components(self) -> int:
        """How many components (heads or neurons) are scored here."""
        return self.heads if self.heads is not None else self.in_features

    def locate(self, checkpoint: Checkpoint, name: str | None = None) -> TensorInfo:
        """Where the matrix lies, as a tensor of two axes.

        If ``name`` is the bias's name: where the bias lies, as a tensor of one axis. A bias to create lies nowhere.
        """
        if name is not None and name == self.bias_vector and self.bias is not None:
            bias = part_of(checkpoint.tensors[self.bias], self.part)
            return replace(bias, shape=(math.prod(bias.shape),))
        return part_of(checkpoint.tensors[self.tensor], self.part)


def _router_site(router: Router, hidden: int) -> Site:
    return Site(
        role=MatrixRole.ROUTER,
        layer=router.layer,
        tensor=router.tensor,
        module=router.router_module,
        orientation="out_in",
        out_features=router.experts,
        in_features=hidden,
        bias=router.bias,
    )


def _name(tensor: str, part: tuple[int, int] | None) -> str:
    """What plans call a tensor, or a part of it."""
    return tensor if part is None else part_name(tensor, part[0])


def part_of(info: TensorInfo, part: tuple[int, int] | None) -> TensorInfo:
    """The tensor, or ``(which, of how many)`` equal parts of its first axis."""
    return info if part is None else info.part(*part)


@dataclass(frozen=True)
class ModelSpec:
    """What the compiler knows of a model: ``sites`` are the writers, attention before MLP, layer by layer.

    ``routers`` are those of the layers that are mixtures of experts; ``frozen`` tensors hold writers in a format that is read
    by no one here, and stay as they are. ``bias_settings`` are the settings of config.json that would give writers a bias.
    """

    model_type: str
    family: str
    hidden_size: int
    layers: int
    sites: tuple[Site, ...]
    embedding: Site
    tied_embeddings: bool
    block_modules: str
    routers: tuple[Router, ...] = ()
    frozen: tuple[str, ...] = ()
    bias_settings: tuple[BiasSetting, ...] = ()

    def site(self, key: str) -> Site:
        """The writer called ``key``; KeyError where there is none."""
        return self._by_key[key]

    @cached_property
    def owners(self) -> Mapping[str, Site]:
        """The site of each matrix and bias that a plan may name, also of biases to create, embedding and routers among them."""
        sites = (*self.sites, self.embedding, *(_router_site(router, self.hidden_size) for router in self.routers))
        return {name: site for site in sites for name in (site.matrix, site.bias_vector, site.new_bias) if name}

    def router(self, layer: int) -> Router:
        """The router of a layer. Raises ArchitectureError where that layer is not a mixture."""
        for router in self.routers:
            if router.layer == layer:
                return router
        layers = ", ".join(str(router.layer) for router in self.routers) or "none"
        raise ArchitectureError(f"layer {layer} has no experts; the layers that are mixtures: {layers}")

    def layer_range(self, chosen: Sequence[int] | None) -> tuple[int, int]:
        """First and last layer of ``chosen``, or of the whole model. Raises ArchitectureError where they are not there."""
        first, last = chosen or (0, self.layers - 1)
        if not 0 <= first <= last < self.layers:
            raise ArchitectureError(f"layers {first}-{last} are not all in this model, which has 0-{self.layers - 1}")
        return first, last

    @property
    def deeper_half(self) -> tuple[int, int]:
        """First and last of the layers that are steered by default: the deeper half of :data:`DEEP` or more, else all."""
        return (self.layers // 2 if self.layers >= DEEP else 0), self.layers - 1

    @cached_property
    def _by_key(self) -> Mapping[str, Site]:
        return {site.key: site for site in self.sites}
