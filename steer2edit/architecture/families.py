"""Model families as data: where each one's residual writers are, and what is done to their output.

A dense family is added by adding an entry here, a mixture of experts by one in ``mixtures.py``, and nowhere else. Names
are those of the checkpoint's tensors inside one block, without ``.weight``.
"""

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

    ``block`` is the module that holds the ``experts`` module in transformers, where the file's folder has another name.
    ``shared`` names the experts that every token passes through, and ``norm`` a norm after the experts' sum that dense
    blocks lack.
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
    block: str = "mlp"
    router_module: str = "gate"


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

    def module(self, leaf: str) -> str:
        """The path inside a block of the module that a tensor ``leaf`` belongs to."""
        return self.modules.get(leaf, leaf)


LLAMA = Family(
    "llama",
    (
        *(
            "llama",
            "mistral",
            "ministral",
            "ministral3",
            "qwen2",
            "qwen3",
            "phi3",
            "gemma",
            "olmo",
            "granite",
            "smollm3",
        ),
        *(
            "cohere",
            "cohere2",
            "nemotron",
            "stablelm",
            "ernie4_5",
            "hunyuan_v1_dense",
            "arcee",
            "apertus",
            "seed_oss",
        ),
        *("helium", "glm", "cwm", "minicpm3", "vaultgemma", "jais2", "granite_swa", "internlm3", "iquestcoder"),
        *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text", "youtu"),
    ),
)

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    Family(
        "gemma2",
        ("gemma2", "gemma3_text"),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        norm_offset=1.0,
    ),
    Family(
        "olmo2",
        ("olmo2", "olmo3", "exaone4"),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    Family("hyperclovax", ("hyperclovax",), attn_norm="post_norm1", mlp_norm="post_norm2"),
    Family("glm4", ("glm4", "glm4v_text"), attn_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm"),
    Family("starcoder2", ("starcoder2",), mlp_out="mlp.c_proj"),
    Family("nanochat", ("nanochat",), mlp_out="mlp.fc2"),
    Family("phi", ("phi",), attn_out="self_attn.dense", mlp_out="mlp.fc2"),
    Family("persimmon", ("persimmon",), attn_out="self_attn.dense", mlp_out="mlp.dense_4h_to_h"),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        attn_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
    ),
    Family(
        "gpt2",
        ("gpt2",),
        attn_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        blocks="transformer.h",
        embedding="transformer.wte",
        orientation="in_out",
    ),
    Family(
        "gpt_bigcode",
        ("gpt_bigcode",),
        attn_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        blocks="transformer.h",
        embedding="transformer.wte",
    ),
    Family(
        "gpt_neo",
        ("gpt_neo",),
        attn_out="attn.attention.out_proj",
        mlp_out="mlp.c_proj",
        blocks="transformer.h",
        embedding="transformer.wte",
    ),
    Family(
        "gptj",
        ("gptj", "codegen"),
        attn_out="attn.out_proj",
        mlp_out="mlp.fc_out",
        blocks="transformer.h",
        embedding="transformer.wte",
    ),
    Family(
        "bloom",
        ("bloom", "falcon"),
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
    ),
    Family(
        "mpt",
        ("mpt",),
        attn_out="attn.out_proj",
        mlp_out="ffn.down_proj",
        blocks="transformer.blocks",
        embedding="transformer.wte",
    ),
    Family("xglm", ("xglm",), attn_out="self_attn.out_proj", mlp_out="fc2"),
    Family(
        "biogpt",
        ("biogpt",),
        attn_out="self_attn.out_proj",
        mlp_out="fc2",
        blocks="biogpt.layers",
        embedding="biogpt.embed_tokens",
    ),
    Family(
        "opt",
        ("opt",),
        attn_out="self_attn.out_proj",
        mlp_out="fc2",
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
    ),
    Family(
        "modernbert_decoder",
        ("modernbert-decoder",),
        attn_out="attn.Wo",
        mlp_out="mlp.Wo",
        embedding="model.embeddings.tok_embeddings",
    ),
    Family("qwen3_5", ("qwen3_5_text",), mixers=("linear_attn.out_proj",)),
    Family(
        "olmo_hybrid",
        ("olmo_hybrid",),
        mixers=("linear_attn.o_proj",),
        bare_mixers=True,
        norm_aliases={"post_attention_layernorm": "feedforward_layer_norm"},
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    Family(
        "lfm2",
        ("lfm2",),
        attn_out="self_attn.out_proj",
        mlp_out="feed_forward.w2",
        mixers=("conv.out_proj",),
    ),
    Family(
        "lfm3",
        ("lfm3",),
        mlp_out="feed_forward.w2",
        mixers=("conv.out_proj",),
        attn_norm="post_operator_norm",
        mlp_norm="post_ffn_norm",
    ),
    Family("bamba", ("bamba",), mlp_out="feed_forward.down_proj", mixers=("mamba.out_proj",)),
    # attention and Mamba side by side in every block
    Family("falcon_h1", ("falcon_h1",), mlp_out="feed_forward.down_proj", mixers=("mamba.out_proj",)),
    Family(
        "recurrent_gemma",
        ("recurrent_gemma",),
        attn_out="temporal_block.o_proj",
        mlp_out="mlp_block.down_proj",
        mixers=("temporal_block.linear_out",),
    ),
    Family(
        "mamba",
        ("mamba", "mamba2", "falcon_mamba"),
        mixers=("mixer.out_proj",),
        partial=True,
        blocks="backbone.layers",
        embedding="backbone.embeddings",
    ),
    Family(
        "xlstm",
        ("xlstm",),
        mlp_out="ffn.proj_down",
        mixers=("mlstm_layer.out_proj",),
        partial=True,
        blocks="backbone.blocks",
        embedding="backbone.embeddings",
    ),
)

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "its AltUp streams and per-layer inputs are no plain residual stream"),
    **dict.fromkeys(("minimax", "zaya"), "its residual stream is rescaled by learned factors in every layer"),
    **dict.fromkeys(("deepseek_v4", "hy_v4", "glm5_next"), "its hyper-connections are no plain residual stream"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "a factor per layer rescales its whole residual stream"),
    "openai-gpt": "a norm rescales its whole residual stream in every block",
    **dict.fromkeys(("zamba", "zamba2"), "several of its layers share one block, in all of which an edit would act"),
    "bitnet": "its matrices are rounded to three values when it runs, which would round a small edit away",
    **dict.fromkeys(("mllama", "mllama_text_model"), "its cross-attention writes through learned gates"),
    "rwkv": "it rescales its residual stream every few layers",
    **dict.fromkeys(("diffllama", "doge"), "its attention heads are not separate blocks of input columns"),
}
"""Model types whose layout is known and cannot carry these edits, with the reason."""

WRAPPERS = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Wrappers of a language model whose config may be flat: others say so by nesting the language model's config."""

MULTIMODAL = (
    *("aya_vision", "deepseek_vl", "exaone4_5", "gemma3", "glm4v", "got_ocr2", "idefics3", "internvl", "lfm2_vl"),
    *("lighton_ocr", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_5", "qwen3_vl", "smolvlm", "video_llava", "vipllava"),
)
"""Multimodal models whose language model is compiled in its place, each tested; others around a known family work alike."""

# leaves that name a residual writer in some family: none of them may be left over in a block
WRITER_LEAVES = frozenset(
    [
        "o_proj",
        "out_proj",
        "wo",
        "wo_b",
        "o_b_proj",
        "attn_out",
        "linear_out",
        "down_proj",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "w2",
        "ff_out",
        "c_proj",
        "dense",
        "output_linear",
        "Wo",
        "proj_down",
    ]
)
