"""Readers as data: each matrix by its name, and the norm that each family puts before it.

Names are those of the checkpoint's tensors inside one block, without ``.weight``. The reader laws of the tests decide whether an
entry is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from steer2edit.architecture.sites import MatrixRole

ROLES: Mapping[str, MatrixRole] = {
    **dict.fromkeys(("q_proj", "Wq", "wq", "to_q", "mlstm_layer.q"), MatrixRole.Q),
    **dict.fromkeys(("k_proj", "Wk", "wk", "to_k", "mlstm_layer.k"), MatrixRole.K),
    **dict.fromkeys(("v_proj", "Wv", "wv", "to_v", "mlstm_layer.v"), MatrixRole.V),
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv"), MatrixRole.QKV),
    "q_a_proj": MatrixRole.Q_LATENT,
    **dict.fromkeys(("kv_a_proj_with_mqa", "wkv_a_with_mqa"), MatrixRole.KV_LATENT),
    **dict.fromkeys(
        ("self_attn.gate_proj", "self_attn.g_proj", "attention.g_proj", "linear_attn.g_proj", "ogate_preact"),
        MatrixRole.ATTN_GATE,
    ),
    **dict.fromkeys(("indexer.wk", "indexer.weights_proj", "index_q_proj", "index_k_proj"), MatrixRole.INDEX),
    **dict.fromkeys(
        (
            *("in_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
            *("linear_x", "linear_y", "a_proj", "b_proj", "f_proj", "f_a_proj", "g_a_proj"),
            *("igate_preact", "fgate_preact"),
        ),
        MatrixRole.MIXER_IN,
    ),
    **dict.fromkeys(
        (
            *("q_b_proj", "kv_b_proj", "wkv_b", "indexer.wq_b", "x_proj", "f_b_proj", "g_b_proj"),
            *("input_layernorm.W_down", "input_layernorm.W_up"),
            *("post_attention_layernorm.W_down", "post_attention_layernorm.W_up"),
        ),
        MatrixRole.MIXER_INSIDE,
    ),
    **dict.fromkeys(("gate_proj", "w1", "c_fc_0", "proj_up_gate"), MatrixRole.GATE),
    **dict.fromkeys(
        ("up_proj", "w3", "v1", "c_fc_1", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "ffn.0", "proj_up"), MatrixRole.UP
    ),
    **dict.fromkeys(("gate_up_proj", "input_linear", "Wi", "experts.fc1"), MatrixRole.GATE_UP),
    "shared_expert_gate": MatrixRole.SHARED_GATE,
    "per_layer_input_gate": MatrixRole.PER_LAYER_GATE,
}
"""The role of a reader by the last one or two components of its name; the longer name counts first."""

LABELLED = (MatrixRole.INDEX, MatrixRole.MIXER_IN, MatrixRole.MIXER_INSIDE)
"""Roles of which a block may have several."""


@dataclass(frozen=True)
class Norms:
    """The norms before a block's readers.

    ``attention`` is before those of attention and other mixers, ``mlp`` before the MLP's, ``experts`` before the routed experts'.

    Of several names the first that a block has counts; a block that has none of them gives its readers the stream itself.
    ``experts`` is the MLP's norm where it is None. ``offset`` is what the norms add to their stored gain, ``last_offset`` what
    the one before the unembedding adds. Norms without ``weights`` have no gain. ``router`` is whether the router reads the MLP's
    norm, ``head`` whether the unembedding reads the last one.
    """

    attention: tuple[str, ...] = ("input_layernorm",)
    mlp: tuple[str, ...] = ("post_attention_layernorm",)
    experts: tuple[str, ...] | None = None
    offset: float = 0.0
    last_offset: float | None = None
    weights: bool = True
    router: bool = True
    head: bool = True


_PLAIN = Norms()
_PARALLEL = Norms(mlp=("input_layernorm",))
_STREAM = Norms(attention=(), mlp=())
_FOUR = Norms(mlp=("pre_feedforward_layernorm",))
_HYBRID = Norms(mlp=("pre_ff_layernorm",))
_OPERATOR = Norms(("operator_norm",), ("ffn_norm",))
_GPT = Norms(("ln_1",), ("ln_2",))

NORMS: Mapping[str, Norms] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere_compass_text", "cohere2_moe", "phi"), _PARALLEL),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "flex_olmo"), _STREAM),
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "exaone"), _GPT),
    **dict.fromkeys(("gptj", "codegen"), Norms(("ln_1",), ("ln_1",))),
    **dict.fromkeys(
        ("xglm", "biogpt", "opt", "kosmos_2_5_text_model"), Norms(("self_attn_layer_norm",), ("final_layer_norm",))
    ),
    **dict.fromkeys(("lfm2", "lfm3", "lfm2_moe"), _OPERATOR),
    **dict.fromkeys(("bamba", "falcon_h1", "jamba"), _HYBRID),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "nemotron_h"), Norms(("norm",), ("norm",))),
    **dict.fromkeys(("apertus", "apertus1p5_text"), Norms(("attention_layernorm",), ("feedforward_layernorm",))),
    **dict.fromkeys(
        ("gemma", "nemotron", "qwen3_5_text", "qwen3_next", "qwen3_5_moe_text", "minimax_m3_vl_text", "step3p5"),
        replace(_PLAIN, offset=1.0),
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "vaultgemma"), replace(_FOUR, offset=1.0)),
    "muse_glimmer_text": replace(_FOUR, offset=1.0, last_offset=0.0),
    **dict.fromkeys(("gemma4_unified_text", "beam"), _FOUR),
    "gemma4_text": replace(_FOUR, experts=("pre_feedforward_layernorm_2",), router=False),
    "recurrent_gemma": Norms(("temporal_pre_norm",), ("channel_pre_norm",), offset=1.0),
    **dict.fromkeys(("olmo", "nanochat"), replace(_PLAIN, weights=False)),
    "stablelm": Norms(mlp=("post_attention_layernorm", "input_layernorm")),
    "falcon": Norms(("ln_attn", "input_layernorm"), ("ln_mlp", "post_attention_layernorm", "input_layernorm")),
    "ctrl": Norms(("layernorm1",), ("layernorm2",)),
    "mpt": Norms(("norm_1",), ("norm_2",)),
    # the first block has no norm before attention, the unembedding a layer of its own before it
    "modernbert-decoder": Norms(("attn_norm",), ("mlp_norm",), head=False),
    # its blocks of full attention have norms after their writers alone
    "olmo_hybrid": Norms(("attention_layer_norm",), ("feedforward_layer_norm",)),
    "xlstm": Norms(("norm_mlstm",), ("norm_ffn",)),
    "afmoe": Norms(mlp=("pre_mlp_layernorm",)),
    "dbrx": Norms(("norm_attn_norm.norm_1",), ("norm_attn_norm.norm_2",)),
    "mistral_large4_text": Norms(("attention_norm",), ("ffn_norm",)),
}
"""By model type; every other type that is described has ``input_layernorm`` and ``post_attention_layernorm``."""

_BAILING = (
    ("attention.f_proj", "self_attn.forget_gate.f_proj"),
    ("attention.", "self_attn."),
)
_SPARSE_BLOCK = (("block_sparse_moe.", "mlp."),)
_DIFFUSERS = tuple((f"self_attn.to_{one}", f"self_attn.{one}_proj") for one in "qkv")
MODULES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "exaone": (
        *(("attn.attention.", "self_attn."), ("mlp.c_fc_0", "mlp.gate_proj"), ("mlp.c_fc_1", "mlp.up_proj")),
        *(("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")),
    ),
    "cosmos3_omni": _DIFFUSERS,
    "cosmos3_edge_text": (*_DIFFUSERS, ("mlp.up_proj", "mlp.fc1")),
    "sarvam_moe": (("attention.", "self_attn."),),
    "bailing_hybrid": _BAILING,
    "laguna": (("mlp.shared_expert.", "mlp.shared_experts."),),
    "hy_v3": (("mlp.shared_mlp.", "mlp.shared_experts."),),
    "minimax_m3_vl_text": (
        *(
            ("self_attn.index_q_proj", "self_attn.indexer.q_proj"),
            ("self_attn.index_k_proj", "self_attn.indexer.k_proj"),
        ),
        *_SPARSE_BLOCK,
    ),
    "kimi_linear": (
        *((f"self_attn.f_{one}_proj", f"self_attn.forget_gate.f_{one}_proj") for one in "ab"),
        *_SPARSE_BLOCK,
    ),
    "step3p5": (("share_expert.", "mlp.shared_experts."),),
    "lfm3": (("self_attn.gate_proj", "self_attn.g_proj"),),
    "olmo_hybrid": (
        ("attention_layer_norm", "input_layernorm"),
        ("feedforward_layer_norm", "post_attention_layernorm"),
    ),
    "axk2": (
        *(("self_attn.q_b_proj", "self_attn.q_gate_proj"),),
        *((f"{one}.W_down", f"{one}.mlp.fc1") for one in ("input_layernorm", "post_attention_layernorm")),
        *((f"{one}.W_up", f"{one}.mlp.fc2") for one in ("input_layernorm", "post_attention_layernorm")),
    ),
    "mistral_large4_text": (
        *(("attention.wq", "self_attn.q_proj"), ("attention.wkv_a_with_mqa", "self_attn.kv_a_proj_with_mqa")),
        *(("attention.wkv_b", "self_attn.kv_b_proj"), ("attention.", "self_attn.")),
        *(("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w3", "mlp.up_proj")),
        *(("shared_experts.w1", "mlp.shared_experts.gate_proj"), ("shared_experts.w3", "mlp.shared_experts.up_proj")),
        *(("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")),
    ),
}
"""How a name on disk begins and how the module's begins in its place, by model type; the first that fits counts."""

TOGETHER: Mapping[str, Mapping[MatrixRole, tuple[str, int, int]]] = {
    "minimax_m3_vl_text": {MatrixRole.GATE: ("gate_up_proj", 0, 2), MatrixRole.UP: ("gate_up_proj", 1, 2)},
}
"""Readers that transformers holds in one module: its last name, and which of how many parts of its output is theirs."""

DIVIDED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sarvam_moe": {"self_attn.query_key_value": tuple(f"self_attn.{one}_proj" for one in "qkv")},
    "lara_mini": {"linear_attn.in_proj": tuple(f"linear_attn.in_proj_{one}" for one in ("qkv", "z", "b", "a"))},
}
"""Readers whose rows transformers divides among modules, in their order."""
