"""What a model family is, as data: where its residual writers are, and what is done to their output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Orientation = Literal["out_in", "in_out"]
Layout = Literal["separate", "out_in", "in_out", "stacked"]


@dataclass(frozen=True)
class Mixture:
    """Where a family's experts and routers are inside one block, on disk unless said otherwise.

    ``output`` is the experts' output matrix, with ``{e}`` where each expert has a tensor of its own (layout ``separate``).
    Fused tensors hold all experts: [E, out, in] (``out_in``), [E, in, out] (``in_out``) or [E * in, out] (``stacked``);
    ``output_bias`` is then [E, out], and ``fused_inputs`` the experts' other tensors.

    ``router`` maps a token to a logit for each expert; ``bias`` is a vector [E] that takes part in the selection alone
    (``bias_of`` scores), or is added to the logits. A config may switch the bias off by ``bias_flag``. ``input_norm`` names a
    LayerNorm with a bias whose output is the router's input: on it a row can give the same logit to every token.

    ``block`` is the module that holds the ``experts`` module in transformers, where the file's folder has another name; it is
    empty where the block itself does. ``shared`` names the experts that every token passes through, and ``norm`` a norm after
    the experts' sum that dense blocks lack. ``routed_norm`` and ``shared_norm`` are norms that each of the two has for itself,
    before they are summed. ``router_input`` is the module that is given what the router's matrix is multiplied by, where that
    is not the router's own input.
    """

    output: str = "mlp.experts.{e}.down_proj.weight"
    layout: Layout = "separate"
    output_bias: str | None = None
    fused_inputs: tuple[str, ...] = ()
    router: str = "mlp.gate.weight"
    bias: str | None = None
    bias_of: Literal["scores", "logits"] = "scores"
    bias_flag: str | None = None
    input_norm: str | None = None
    shared: str | None = None
    norm: str | None = None
    routed_norm: str | None = None
    shared_norm: str | None = None
    block: str = "mlp"
    router_module: str = "gate"
    router_input: str | None = None


@dataclass(frozen=True)
class Multiplier:
    """A setting of config.json by which a writer's output is multiplied before it joins the stream.

    ``item`` is its place where the setting is a list; ``by_depth`` divides it by the square root of the number of layers.
    """

    key: str
    item: int | None = None
    by_depth: bool = False


Part = Literal["attention", "mixer", "mlp", "experts"]


@dataclass(frozen=True)
class Family:
    """A layout shared by the model types of one kind.

    ``attn_norm`` and ``mlp_norm`` name a norm that stands between a writer's output and the residual stream
    (sandwich-norm and post-norm families); ``norm_offset`` is what the norm adds to its stored gain (1 for the Gemma
    norms), and ``norm_aliases`` gives another name that a norm may have in the file. ``in_out`` is the orientation of
    GPT-2's Conv1D, whose matrices are stored input × output. ``mixers`` are writers that some blocks have in place of
    attention, or beside it; ``bare_mixers`` says that blocks with one have no norm after their writers, though others
    do, and ``partial`` that a block may lack either part. ``blocks`` and ``embedding`` are module paths in
    transformers; ``modules`` gives a module's name where the file's differs, ``prefix`` the file's ``blocks``, and
    ``disk_embedding`` the last part of its embedding's name.

    ``multipliers`` are factors of the config on what each kind of writer adds to the stream; routed experts have the MLP's
    unless they have one of their own. ``final_norm`` is the norm after
    the last block (None where it has no weight), ``head`` the unembedding, both as the file names them; ``may_lack`` are
    tensors that some blocks do not have.

    ``per_layer_out`` is Gemma 4's third writer, which puts an embedding of the token for this layer into the stream, and
    ``per_layer_norm`` the norm after it. ``block_scale`` is a tensor of one number by which a block multiplies its whole
    stream at its end. ``depth_scaled`` is Beam's rule: the n-th addition to the stream, of which a block has two, is the
    second and so on, gives ``sqrt((n - 1) / n)`` times the stream plus ``sqrt(1 / n)`` times what is added.
    """

    name: str
    model_types: tuple[str, ...]
    attn_out: str = "self_attn.o_proj"
    mlp_out: str = "mlp.down_proj"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    orientation: Orientation = "out_in"
    attn_norm: str | None = None
    mlp_norm: str | None = None
    norm_offset: float = 0.0
    norm_aliases: Mapping[str, str] = field(default_factory=dict)
    mixers: tuple[str, ...] = ()
    bare_mixers: bool = False
    partial: bool = False
    mixture: Mixture | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    prefix: str | None = None
    disk_embedding: str | None = None
    multipliers: Mapping[Part, Multiplier] = field(default_factory=dict)
    final_norm: str | None = "norm"
    head: str = "lm_head"
    may_lack: tuple[str, ...] = ()
    per_layer_out: str | None = None
    per_layer_norm: str | None = None
    block_scale: str | None = None
    depth_scaled: bool = False

    def module(self, leaf: str) -> str:
        """The path inside a block of the module that a tensor ``leaf`` belongs to."""
        return self.modules.get(leaf, leaf)
