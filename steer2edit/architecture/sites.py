"""What the compiler knows of a model: its residual writers, their components, and its routers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Literal

from steer2edit.architecture.carriers import BiasSetting
from steer2edit.architecture.family import Orientation
from steer2edit.architecture.routers import Router
from steer2edit.checkpoint import Checkpoint, TensorInfo, part_name
from steer2edit.errors import ArchitectureError

DEEP = 12
"""From so many layers on the first half is left alone. Measured on 18 and 30 layers; with 6, the first ones are needed."""


class MatrixRole(str, Enum):
    """What a matrix is to the residual stream. A mixer is whatever stands in attention's place (Mamba, convolution).

    The first seven are writers. The others are readers: attention's (``*_LATENT`` are the matrices that MLA's latents come from,
    INDEX those of sparse attention's indexer), a mixer's, an MLP's or an expert's, the router and the unembedding.
    ``MIXER_INSIDE`` is a matrix between an attention's or a mixer's readers and its writer.
    """

    ATTN_OUT = "attn_out"
    MIXER_OUT = "mixer_out"
    MLP_OUT = "mlp_out"
    EXPERT_OUT = "expert_out"
    SHARED_EXPERT_OUT = "shared_expert_out"
    PER_LAYER_OUT = "per_layer_out"
    EMBED = "embed"

    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    Q_LATENT = "q_latent"
    KV_LATENT = "kv_latent"
    ATTN_GATE = "attn_gate"
    INDEX = "index"
    MIXER_IN = "mixer_in"
    MIXER_INSIDE = "mixer_inside"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    SHARED_GATE = "shared_gate"
    PER_LAYER_GATE = "per_layer_gate"
    ROUTER = "router"
    UNEMBED = "unembed"

    @property
    def writes(self) -> bool:
        """Whether its output goes into the residual stream; other matrices read from it, or lie between."""
        return self in _WRITERS

    @property
    def kind(self) -> MatrixRole:
        """ATTN_OUT for all that moves information between tokens, MLP_OUT for all that works on each token by itself."""
        if self in _BETWEEN_TOKENS:
            return MatrixRole.ATTN_OUT
        alone = (MatrixRole.EMBED, MatrixRole.ROUTER, MatrixRole.UNEMBED)
        return self if self in alone else MatrixRole.MLP_OUT


_WRITERS = frozenset(
    {
        *(MatrixRole.ATTN_OUT, MatrixRole.MIXER_OUT, MatrixRole.MLP_OUT, MatrixRole.EXPERT_OUT),
        *(MatrixRole.SHARED_EXPERT_OUT, MatrixRole.PER_LAYER_OUT, MatrixRole.EMBED),
    }
)
_BETWEEN_TOKENS = frozenset(
    {
        *(MatrixRole.ATTN_OUT, MatrixRole.MIXER_OUT),
        *(MatrixRole.Q, MatrixRole.K, MatrixRole.V, MatrixRole.QKV, MatrixRole.Q_LATENT, MatrixRole.KV_LATENT),
        *(MatrixRole.ATTN_GATE, MatrixRole.INDEX, MatrixRole.MIXER_IN, MatrixRole.MIXER_INSIDE),
    }
)
Reads = Literal["norm", "stream", "inside", "unknown"]
"""What a reader's input is.

``norm``: a norm's output, times a number at most. ``stream``: the residual stream, as it is or changed by something else than a
plain norm. ``inside``: what another reader made, such as a latent. ``unknown``: nothing is known of it.
"""


@dataclass(frozen=True)
class Norm:
    """A norm between a writer's output and the stream; its gain is ``offset`` + the tensor's values.

    ``first`` is the tensor of another norm between the writer and this one.
    """

    tensor: str
    offset: float
    first: str | None = None


@dataclass(frozen=True)
class InputNorm:
    """A norm before a reader.

    The reader's input is ``gain * n + bias`` for the normalised stream n, times a number at most. The gain is ``offset`` + the
    values of ``tensor``, and 1 where there is no tensor. ``module`` is the norm's in transformers.
    """

    module: str
    tensor: str | None
    offset: float
    bias: str | None = None


@dataclass(frozen=True)
class Site:
    """One weight matrix that writes to the residual stream or reads from it.

    ``in_features`` and ``out_features`` are those of ``y = W x`` whatever the file's ``orientation``. ``heads`` is the
    number of attention heads, each a block of ``in_features / heads`` input columns, and None elsewhere, where the
    components are single input columns. ``multiplier`` is what the model multiplies the output by (after the norm, if there is
    one) before it joins the stream. ``block_scale`` is the number by which the block multiplies its whole stream, this output
    included, at its end, or the tensor that holds the number. ``expert`` is the expert's number. Where a tensor holds several
    experts, ``part`` is ``(which, of how many)`` equal parts of its first stored axis; ``module`` is then that of all the
    experts.

    A reader says what it ``reads``, and ``norm_before`` is the norm whose output that is. ``label`` tells readers of one role in
    one block apart. Where transformers holds a reader's matrix together with another one, ``output_part`` is ``(which, of how
    many)`` equal parts of the module's output; where it is divided, ``modules`` are those of its rows, in order.
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
    label: str = ""
    reads: Reads = "inside"
    norm_before: InputNorm | None = None
    output_part: tuple[int, int] | None = None
    modules: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Stable name used in statistics and plans: ``attn_out.3``, ``expert_out.3.17``, ``q.3``, ``up/shared.3``."""
        head = f"{self.role.value}/{self.label}" if self.label else self.role.value
        tail = "" if self.expert is None else f".{self.expert}"
        return f"{head}.{self.layer}{tail}"

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


def _name(tensor: str, part: tuple[int, int] | None) -> str:
    """What plans call a tensor, or a part of it."""
    return tensor if part is None else part_name(tensor, part[0])


def part_of(info: TensorInfo, part: tuple[int, int] | None) -> TensorInfo:
    """The tensor, or ``(which, of how many)`` equal parts of its first axis."""
    return info if part is None else info.part(*part)


@dataclass(frozen=True)
class ModelSpec:
    """What the compiler knows of a model: ``sites`` are the writers, attention before MLP, layer by layer.

    ``readers`` are the other matrices of the blocks, in the same order, routers among them, and the unembedding where it is a
    matrix of its own. ``undescribed`` are matrices of the blocks of which nothing is known.
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
    readers: tuple[Site, ...] = ()
    undescribed: tuple[str, ...] = ()

    def site(self, key: str) -> Site:
        """The writer or reader called ``key``; KeyError where there is none."""
        return self._by_key[key]

    @cached_property
    def owners(self) -> Mapping[str, Site]:
        """The site of each matrix and bias that a plan may name: writers, the embedding, readers with the routers.

        Biases to create are among them.
        """
        sites = (*self.sites, self.embedding, *self.readers)
        return {name: site for site in sites for name in (site.matrix, site.bias_vector, site.new_bias) if name}

    def why_unknown(self, name: str) -> str:
        """Why a plan can edit nothing of this name."""
        if name in self.undescribed or f"{name}.weight" in self.undescribed:
            return f"{name} is a matrix of {self.model_type} that is not described, and cannot be edited"
        return (
            f"{name} is neither a writer nor a reader of the residual stream that is known in a {self.model_type} model"
        )

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
        return {site.key: site for site in (*self.sites, *self.readers)}
