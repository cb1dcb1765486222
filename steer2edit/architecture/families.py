"""The dense model families: where each one's residual writers are, and what is done to their output.

A dense family is added by adding an entry here, a mixture of experts by one in ``mixtures.py``, and nowhere else. Names
are those of the checkpoint's tensors inside one block, without ``.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping

from steer2edit.architecture.family import Family, Multiplier, Part


def _on_every_writer(multiplier: Multiplier) -> Mapping[Part, Multiplier]:
    return {"attention": multiplier, "mixer": multiplier, "mlp": multiplier}


GRANITE_MULTIPLIERS = _on_every_writer(Multiplier("residual_multiplier"))

LLAMA = Family(
    "llama",
    (
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "phi3", "gemma", "smollm3"),
        *("cohere", "cohere2", "nemotron", "stablelm", "ernie4_5", "hunyuan_v1_dense", "arcee", "apertus", "seed_oss"),
        *("helium", "glm", "cwm", "vaultgemma", "jais2", "internlm3", "iquestcoder"),
        *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text", "youtu"),
        *("apertus1p5_text", "cohere_compass_text", "phi4_multimodal"),
        *("qwen2_5_omni_text", "hunyuan_vl_text", "paddleocr_vl_text", "emu3_text_model", "chameleon"),
    ),
)

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    Family("olmo", ("olmo",), final_norm=None),
    Family(
        "granite",
        ("granite", "granite_swa", "granite_docling_text", "granite4_vision_text"),
        multipliers=GRANITE_MULTIPLIERS,
    ),
    Family("minicpm3", ("minicpm3",), multipliers=_on_every_writer(Multiplier("scale_depth", by_depth=True))),
    Family(
        "gemma2",
        ("gemma2", "gemma3_text", "muse_glimmer_text"),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        norm_offset=1.0,
    ),
    Family(
        "gemma4_unified",
        ("gemma4_unified_text",),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        block_scale="layer_scalar",
    ),
    Family(
        "olmo2",
        ("olmo2", "olmo3", "exaone4"),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    Family(
        "hyperclovax",
        ("hyperclovax",),
        attn_norm="post_norm1",
        mlp_norm="post_norm2",
        multipliers=GRANITE_MULTIPLIERS,
    ),
    Family(
        "glm4",
        ("glm4", "glm4v_text", "glm_ocr_text"),
        attn_norm="post_self_attn_layernorm",
        mlp_norm="post_mlp_layernorm",
    ),
    # published in the names of diffusers
    Family(
        "cosmos3",
        ("cosmos3_omni",),
        attn_out="self_attn.to_out",
        modules={"self_attn.to_out": "self_attn.o_proj"},
    ),
    Family(
        "cosmos3_edge",
        ("cosmos3_edge_text",),
        attn_out="self_attn.to_out",
        modules={"self_attn.to_out": "self_attn.o_proj", "mlp.down_proj": "mlp.fc2"},
    ),
    Family("starcoder2", ("starcoder2",), mlp_out="mlp.c_proj"),
    Family(
        "nanochat",
        ("nanochat",),
        mlp_out="mlp.fc2",
        final_norm=None,
    ),
    Family(
        "phi",
        ("phi",),
        attn_out="self_attn.dense",
        mlp_out="mlp.fc2",
        final_norm="final_layernorm",
    ),
    Family(
        "persimmon",
        ("persimmon",),
        attn_out="self_attn.dense",
        mlp_out="mlp.dense_4h_to_h",
        final_norm="final_layernorm",
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        attn_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="final_layer_norm",
        head="embed_out",
    ),
    Family(
        "gpt2",
        ("gpt2", "gpt-sw3"),
        attn_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        blocks="transformer.h",
        embedding="transformer.wte",
        orientation="in_out",
        final_norm="ln_f",
    ),
    Family(
        "exaone",
        ("exaone",),
        attn_out="attn.attention.out_proj",
        mlp_out="mlp.c_proj",
        prefix="transformer.h",
        disk_embedding="wte",
        modules={"attn.attention.out_proj": "self_attn.o_proj", "mlp.c_proj": "mlp.down_proj"},
        final_norm="ln_f",
    ),
    Family(
        "ctrl",
        ("ctrl",),
        attn_out="multi_head_attention.dense",
        mlp_out="ffn.2",
        blocks="transformer.h",
        embedding="transformer.w",
        final_norm="layernorm",
    ),
    Family(
        "gpt_bigcode",
        ("gpt_bigcode",),
        attn_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="ln_f",
    ),
    Family(
        "gpt_neo",
        ("gpt_neo",),
        attn_out="attn.attention.out_proj",
        mlp_out="mlp.c_proj",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="ln_f",
    ),
    Family(
        "gptj",
        ("gptj", "codegen"),
        attn_out="attn.out_proj",
        mlp_out="mlp.fc_out",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="ln_f",
    ),
    Family(
        "bloom",
        ("bloom", "falcon"),
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="ln_f",
    ),
    Family(
        "mpt",
        ("mpt",),
        attn_out="attn.out_proj",
        mlp_out="ffn.down_proj",
        blocks="transformer.blocks",
        embedding="transformer.wte",
        final_norm="norm_f",
    ),
    Family(
        "xglm",
        ("xglm",),
        attn_out="self_attn.out_proj",
        mlp_out="fc2",
        final_norm="layer_norm",
    ),
    Family(
        "kosmos2_5",
        ("kosmos_2_5_text_model",),
        attn_out="self_attn.out_proj",
        mlp_out="ffn.fc2",
        final_norm="layer_norm",
    ),
    Family(
        "biogpt",
        ("biogpt",),
        attn_out="self_attn.out_proj",
        mlp_out="fc2",
        blocks="biogpt.layers",
        embedding="biogpt.embed_tokens",
        final_norm="layer_norm",
        head="output_projection",
    ),
    Family(
        "opt",
        ("opt",),
        attn_out="self_attn.out_proj",
        mlp_out="fc2",
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="final_layer_norm",
    ),
    Family(
        "modernbert_decoder",
        ("modernbert-decoder",),
        attn_out="attn.Wo",
        mlp_out="mlp.Wo",
        embedding="model.embeddings.tok_embeddings",
        final_norm="final_norm",
        head="decoder",
        may_lack=("attn_norm",),
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
        final_norm="embedding_norm",
    ),
    Family(
        "lfm3",
        ("lfm3",),
        mlp_out="feed_forward.w2",
        mixers=("conv.out_proj",),
        attn_norm="post_operator_norm",
        mlp_norm="post_ffn_norm",
        final_norm="embedding_norm",
    ),
    Family(
        "bamba",
        ("bamba",),
        mlp_out="feed_forward.down_proj",
        mixers=("mamba.out_proj",),
        final_norm="final_layernorm",
    ),
    # attention and Mamba side by side in every block
    Family(
        "falcon_h1",
        ("falcon_h1",),
        mlp_out="feed_forward.down_proj",
        mixers=("mamba.out_proj",),
        multipliers={
            "attention": Multiplier("attention_out_multiplier"),
            "mixer": Multiplier("ssm_out_multiplier"),
            "mlp": Multiplier("mlp_multipliers", item=1),
        },
        final_norm="final_layernorm",
    ),
    Family(
        "recurrent_gemma",
        ("recurrent_gemma",),
        attn_out="temporal_block.o_proj",
        mlp_out="mlp_block.down_proj",
        mixers=("temporal_block.linear_out",),
        final_norm="final_norm",
    ),
    Family(
        "mamba",
        ("mamba", "mamba2", "falcon_mamba"),
        mixers=("mixer.out_proj",),
        partial=True,
        blocks="backbone.layers",
        embedding="backbone.embeddings",
        final_norm="norm_f",
    ),
    Family(
        "xlstm",
        ("xlstm",),
        mlp_out="ffn.proj_down",
        mixers=("mlstm_layer.out_proj",),
        partial=True,
        blocks="backbone.blocks",
        embedding="backbone.embeddings",
        final_norm="out_norm",
    ),
)

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
