"""Mixtures of experts as data: where each family's experts, routers and shared experts are.

Which weights switch an expert off, and how exactly, follows from these entries; see ``experts/lowering.py``.
"""

from __future__ import annotations

from dataclasses import replace

from steer2edit.architecture.families import GRANITE_MULTIPLIERS
from steer2edit.architecture.family import Family, Mixture, Multiplier

_PER_EXPERT = Mixture()
_CORRECTED = Mixture(bias="mlp.gate.e_score_correction_bias", shared="mlp.shared_experts.down_proj")
_SPARSE_BLOCK = Mixture(output="block_sparse_moe.experts.{e}.w2.weight", router="block_sparse_moe.gate.weight")
_FUSED_GRANITE = Mixture(
    output="block_sparse_moe.output_linear.weight",
    layout="out_in",
    fused_inputs=("block_sparse_moe.input_linear.weight",),
    router="block_sparse_moe.router.layer.weight",
    block="block_sparse_moe",
    router_module="router",
)
_FUSED = Mixture(output="mlp.experts.down_proj", layout="out_in", fused_inputs=("mlp.experts.gate_up_proj",))

MIXTURES: tuple[Family, ...] = (
    Family("qwen_moe", ("qwen3_moe", "olmoe", "mellum", "qwen3_omni_moe_text"), mixture=_PER_EXPERT),
    Family("qwen2_moe", ("qwen2_moe", "flint"), mixture=replace(_PER_EXPERT, shared="mlp.shared_expert.down_proj")),
    Family(
        "flex_olmo",
        ("flex_olmo",),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mixture=_PER_EXPERT,
    ),
    Family(
        "deepseek_v3",
        (
            *("deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
            *("solar_open", "mimo_v2_flash", "axk2", "sarvam_mla", "dots3_note_text", "glm4v_moe_text"),
        ),
        mixture=_CORRECTED,
    ),
    Family(
        "deepseek_v2",
        ("deepseek_v2", "cohere2_moe", "deepseek_ocr2_text", "unlimited_ocr_text"),
        mixture=replace(_PER_EXPERT, shared="mlp.shared_experts.down_proj"),
    ),
    Family("axk1", ("axk1",), mixture=replace(_CORRECTED, norm="post_mlp_layernorm")),
    Family(
        "kolibri1",
        ("kolibri1",),
        attn_norm="post_attn_norm",
        mlp_norm="post_ffn_norm",
        mixture=replace(_CORRECTED, bias="moe.router.expert_bias", bias_of="logits"),
        modules={"post_attn_norm": "post_self_attn_layernorm", "post_ffn_norm": "post_mlp_layernorm"},
    ),
    Family(
        "sarvam_moe",
        ("sarvam_moe",),
        attn_out="attention.dense",
        disk_embedding="word_embeddings",
        mixture=replace(_CORRECTED, bias="mlp.gate.expert_bias"),
        modules={"attention.dense": "self_attn.o_proj"},
    ),
    # each addition to the stream is weighed so that the stream's variance stays what it is
    Family(
        "beam",
        ("beam",),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mixture=replace(_CORRECTED, shared=None),
        depth_scaled=True,
    ),
    Family("exaone_moe", ("exaone_moe",), mixture=replace(_CORRECTED, bias="mlp.e_score_correction_bias")),
    Family(
        "ernie4_5_moe",
        ("ernie4_5_moe",),
        mixture=replace(_CORRECTED, bias="mlp.moe_statics.e_score_correction_bias"),
    ),
    Family(
        "laguna",
        ("laguna",),
        mixture=replace(_CORRECTED, bias="mlp.experts.e_score_correction_bias", shared="mlp.shared_expert.down_proj"),
        modules={"mlp.shared_expert.down_proj": "mlp.shared_experts.down_proj"},
    ),
    Family(
        "hy_v3",
        ("hy_v3",),
        mixture=Mixture(router="mlp.router.gate.weight", bias="mlp.expert_bias", shared="mlp.shared_mlp.down_proj"),
        modules={"mlp.shared_mlp.down_proj": "mlp.shared_experts.down_proj"},
    ),
    Family(
        "afmoe",
        ("afmoe",),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_mlp_layernorm",
        mixture=Mixture(
            router="mlp.router.gate.weight",
            bias="mlp.expert_bias",
            shared="mlp.shared_experts.down_proj",
            router_module="router",
        ),
    ),
    Family(
        "hunyuan_v1_moe",
        ("hunyuan_v1_moe",),
        mixture=Mixture(router="mlp.gate.wg.weight", shared="mlp.shared_mlp.down_proj"),
    ),
    Family("mixtral", ("mixtral",), mixture=_SPARSE_BLOCK),
    Family(
        "phimoe",
        ("phimoe",),
        mixture=replace(_SPARSE_BLOCK, router_module="router", input_norm="post_attention_layernorm"),
    ),
    Family(
        "minimax_m2",
        ("minimax_m2",),
        mixture=replace(_SPARSE_BLOCK, bias="block_sparse_moe.e_score_correction_bias", bias_flag="use_routing_bias"),
    ),
    Family(
        "minimax_m3",
        ("minimax_m3_vl_text",),
        mixture=replace(
            _SPARSE_BLOCK,
            bias="block_sparse_moe.e_score_correction_bias",
            shared="block_sparse_moe.shared_experts.down_proj",
        ),
        modules={"block_sparse_moe.shared_experts.down_proj": "mlp.shared_experts.down_proj"},
        multipliers={"experts": Multiplier("routed_scaling_factor")},
    ),
    Family(
        "step3p5",
        ("step3p5",),
        mixture=Mixture(
            output="moe.down_proj.weight",
            layout="out_in",
            fused_inputs=("moe.gate_proj.weight", "moe.up_proj.weight"),
            router="moe.gate.weight",
            bias="moe.router_bias",
            shared="share_expert.down_proj",
        ),
        modules={"share_expert.down_proj": "mlp.shared_experts.down_proj"},
        multipliers={"experts": Multiplier("moe_router_scaling_factor")},
    ),
    Family(
        "kimi_linear",
        ("kimi_linear",),
        mixers=("self_attn.o_proj",),
        mixture=replace(
            _SPARSE_BLOCK,
            bias="block_sparse_moe.gate.e_score_correction_bias",
            shared="block_sparse_moe.shared_experts.down_proj",
        ),
        modules={"block_sparse_moe.shared_experts.down_proj": "mlp.shared_experts.down_proj"},
    ),
    Family(
        "bailing_hybrid",
        ("bailing_hybrid",),
        attn_out="attention.dense",
        mixers=("attention.dense",),
        disk_embedding="word_embeddings",
        mixture=replace(_CORRECTED, bias="mlp.gate.expert_bias", bias_flag="moe_router_enable_expert_bias"),
        modules={"attention.dense": "self_attn.o_proj"},
    ),
    Family(
        "qwen3_next",
        ("qwen3_next", "qwen3_5_moe_text"),
        mixers=("linear_attn.out_proj",),
        mixture=replace(_PER_EXPERT, shared="mlp.shared_expert.down_proj"),
    ),
    Family(
        "lara_mini",
        ("lara_mini",),
        mixers=("linear_attn.out_proj",),
        mixture=replace(_FUSED, shared="mlp.shared_expert.down_proj"),
    ),
    Family(
        "lfm2_moe",
        ("lfm2_moe",),
        attn_out="self_attn.out_proj",
        mlp_out="feed_forward.w2",
        mixers=("conv.out_proj",),
        mixture=Mixture(
            output="feed_forward.experts.{e}.w2.weight",
            router="feed_forward.gate.weight",
            bias="feed_forward.expert_bias",
            bias_flag="use_expert_bias",
            block="feed_forward",
        ),
        final_norm="embedding_norm",
    ),
    Family(
        "jamba",
        ("jamba",),
        mlp_out="feed_forward.down_proj",
        mixers=("mamba.out_proj",),
        mixture=Mixture(
            output="feed_forward.experts.{e}.down_proj.weight",
            router="feed_forward.router.weight",
            block="feed_forward",
            router_module="router",
        ),
        final_norm="final_layernorm",
    ),
    Family(
        "nemotron_h",
        ("nemotron_h",),
        attn_out="mixer.o_proj",
        mlp_out="mixer.down_proj",
        mixers=("mixer.out_proj",),
        partial=True,
        prefix="backbone.layers",
        embedding="model.embeddings",
        mixture=Mixture(
            output="mixer.experts.{e}.down_proj.weight",
            router="mixer.gate.weight",
            bias="mixer.gate.e_score_correction_bias",
            shared="mixer.shared_experts.down_proj",
            block="mixer",
        ),
        final_norm="norm_f",
    ),
    Family("granitemoe", ("granitemoe",), mixture=_FUSED_GRANITE, multipliers=GRANITE_MULTIPLIERS),
    Family(
        "granitemoeshared",
        ("granitemoeshared", "granitemoehybrid"),
        mlp_out="shared_mlp.output_linear",
        mixers=("mamba.out_proj",),
        mixture=replace(_FUSED_GRANITE, shared="shared_mlp.output_linear"),
        multipliers=GRANITE_MULTIPLIERS,
    ),
    Family(
        "granitemoe_swa",
        ("granitemoe_swa",),
        mlp_out="shared_mlp.output_linear",
        mixture=Mixture(
            output="block_sparse_moe.experts.down_proj",
            layout="out_in",
            fused_inputs=("block_sparse_moe.experts.gate_up_proj",),
            router="block_sparse_moe.router.weight",
            shared="shared_mlp.output_linear",
            block="block_sparse_moe",
            router_module="router",
        ),
        multipliers=GRANITE_MULTIPLIERS,
    ),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        mixture=Mixture(
            output="mlp.experts.down_proj",
            layout="in_out",
            output_bias="mlp.experts.down_proj_bias",
            fused_inputs=("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"),
            router="mlp.router.weight",
            bias="mlp.router.bias",
            bias_of="logits",
            router_module="router",
        ),
    ),
    Family(
        "qwen3_vl_moe",
        ("qwen3_vl_moe_text",),
        mixture=Mixture(output="mlp.experts.down_proj", layout="in_out", fused_inputs=("mlp.experts.gate_up_proj",)),
    ),
    # the names are Mistral's own
    Family(
        "mistral_large4",
        ("mistral_large4_text",),
        attn_out="attention.wo",
        mlp_out="feed_forward.w2",
        modules={
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w2": "mlp.down_proj",
            "shared_experts.w2": "mlp.shared_experts.down_proj",
        },
        disk_embedding="tok_embeddings",
        head="output",
        mixture=Mixture(output="experts.{e}.w2.weight", router="gate.weight", shared="shared_experts.w2"),
    ),
    Family(
        "llama4",
        ("llama4_text",),
        mlp_out="feed_forward.down_proj",
        mixture=Mixture(
            output="feed_forward.experts.down_proj",
            layout="in_out",
            fused_inputs=("feed_forward.experts.gate_up_proj",),
            router="feed_forward.router.weight",
            shared="feed_forward.shared_expert.down_proj",
            block="feed_forward",
            router_module="router",
        ),
    ),
    # one type is dense or a mixture; in the mixture the dense MLP runs beside the experts
    Family(
        "gemma4",
        ("gemma4_text",),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        mixture=Mixture(
            output="experts.down_proj",
            layout="out_in",
            fused_inputs=("experts.gate_up_proj", "router.per_expert_scale"),
            router="router.proj.weight",
            shared="mlp.down_proj",
            routed_norm="post_feedforward_layernorm_2",
            shared_norm="post_feedforward_layernorm_1",
            block="",
            router_module="router",
            router_input="router.proj",
        ),
        per_layer_out="per_layer_projection",
        per_layer_norm="post_per_layer_input_norm",
        block_scale="layer_scalar",
    ),
    Family("mistral4", ("mistral4",), mixture=replace(_FUSED, shared="mlp.shared_experts.down_proj")),
    Family(
        "aria",
        ("aria_text",),
        mixture=Mixture(
            output="mlp.experts.fc2.weight",
            layout="in_out",
            fused_inputs=("mlp.experts.fc1.weight",),
            router="mlp.router.weight",
            shared="mlp.shared_experts.down_proj",
            router_module="router",
        ),
    ),
    Family(
        "dbrx",
        ("dbrx",),
        attn_out="norm_attn_norm.attn.out_proj",
        blocks="transformer.blocks",
        embedding="transformer.wte",
        mixture=Mixture(
            output="ffn.experts.mlp.w2",
            layout="stacked",
            fused_inputs=("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"),
            router="ffn.router.layer.weight",
            block="ffn",
            router_module="router",
        ),
        final_norm="norm_f",
    ),
)
