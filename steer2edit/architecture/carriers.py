"""Carriers of a constant: settings of config.json by which a writer takes a bias that its checkpoint lacks.

A bias of the writer before a place in the residual stream is a constant there, at every token. A model's class gives its
modules biases where a setting says so, and an engine that reads the setting loads them. One setting gives several modules a
bias: those that are not wanted come with it, as zeros. ``tests/test_carriers.py`` asks transformers whether the table is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.checkpoint.header import DTYPES, EDITABLE

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = tuple(leaf.replace("mlp.", "mlp.shared_experts.") for leaf in _MLP)
_WIDE = tuple(leaf.replace("mlp.", "feed_forward.") for leaf in _MLP)
_MAMBA = ("mamba.in_proj", "mamba.out_proj")


@dataclass(frozen=True)
class Carrier:
    """The settings ``keys`` give the modules ``leaves`` of every block that has them a bias, and ``around`` those outside.

    Names are the file's, without ``.weight``. ``beside`` is a module without which a block's modules get none.
    """

    keys: tuple[str, ...]
    leaves: tuple[str, ...]
    around: tuple[str, ...] = ()
    beside: str | None = None


@dataclass(frozen=True)
class BiasSetting:
    """A carrier in one checkpoint: the settings to switch on, and each bias that comes with them, by name.

    The places of ``creates`` give dtype and length alone: no file holds them yet.
    """

    keys: tuple[str, ...]
    creates: Mapping[str, TensorInfo]


_ATTENTION = Carrier(("attention_bias",), (*_QKV, "self_attn.o_proj"))
_LATENT_ATTENTION = Carrier(("attention_bias",), (*_LATENT, "self_attn.o_proj"))
_DENSE = Carrier(("mlp_bias",), _MLP)
_DENSE_AND_SHARED = Carrier(("mlp_bias",), (*_MLP, *_SHARED))
_FEED_FORWARD = Carrier(("mlp_bias",), _WIDE)
_PROJECTIONS = Carrier(("mamba_proj_bias",), _MAMBA)
_MIXER = Carrier(("use_bias",), ("mixer.in_proj", "mixer.out_proj"))
_CONVOLUTION = Carrier(("conv_bias",), ("conv.conv", "conv.in_proj", "conv.out_proj"))
_BOTH = (*_QKV, "self_attn.o_proj", *_MLP)

CARRIERS: Mapping[str, tuple[Carrier, ...]] = {
    **dict.fromkeys(
        (
            *("qwen3", "gemma", "cohere", "cohere2", "hunyuan_v1_dense", "apertus", "vaultgemma", "olmo", "nanochat"),
            *("qwen3_vl_text", "apertus1p5_text", "cohere_compass_text", "hunyuan_vl_text", "qwen3_5_text"),
            # mixtures, whose attention has no norm behind it
            *("qwen3_moe", "olmoe", "mellum", "qwen3_omni_moe_text", "flint", "dots1", "cohere2_moe", "laguna"),
            *("hunyuan_v1_moe", "phimoe", "qwen3_next", "qwen3_5_moe_text", "lara_mini", "granitemoe"),
            *("granitemoeshared", "granitemoe_swa", "qwen3_vl_moe_text", "llama4_text", "aria_text"),
        ),
        (_ATTENTION,),
    ),
    **dict.fromkeys(
        (
            *("llama", "smollm3", "nemotron", "arcee", "iquestcoder", "granite", "granite_swa"),
            *("granite_docling_text", "granite4_vision_text"),
        ),
        (_ATTENTION, _DENSE),
    ),
    # keys and values are latent
    **dict.fromkeys(
        (
            *("youtu", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "axk1", "axk2", "sarvam_mla"),
            *("dots3_note_text", "mistral4"),
        ),
        (_LATENT_ATTENTION,),
    ),
    "kimi_linear": (Carrier(("attention_bias",), (*_LATENT, "self_attn.o_proj"), beside=_LATENT[1]),),
    "bailing_hybrid": (
        Carrier(
            ("attention_bias",),
            ("attention.q_a_proj", "attention.kv_a_proj_with_mqa", "attention.dense"),
            beside="attention.kv_a_proj_with_mqa",
        ),
    ),
    "mistral_large4_text": (Carrier(("attention_bias",), ("attention.wkv_a_with_mqa", "attention.wo")),),
    "minicpm3": (_LATENT_ATTENTION, _DENSE),
    "deepseek_v2": (_LATENT_ATTENTION, _DENSE_AND_SHARED),
    "hy_v3": (
        _ATTENTION,
        Carrier(("mlp_bias",), (*_MLP, *(leaf.replace("mlp.", "mlp.shared_mlp.") for leaf in _MLP))),
    ),
    **dict.fromkeys(("helium", "cwm"), (_DENSE,)),
    "seed_oss": (Carrier(("attention_out_bias",), ("self_attn.o_proj",)), _DENSE),
    # its class takes both or neither, under its own names too
    "internlm3": (Carrier(("attention_bias", "mlp_bias", "qkv_bias", "bias"), _BOTH),),
    **dict.fromkeys(("ernie4_5", "paddleocr_vl_text"), (Carrier(("use_bias",), _BOTH),)),
    "ernie4_5_moe": (Carrier(("use_bias",), (*_BOTH, *_SHARED), around=("lm_head",)),),
    "exaone": (
        Carrier(
            ("attention_bias",), tuple(f"attn.attention.{leaf}_proj" for leaf in ("q", "k", "v", "out"))
        ),
        Carrier(("mlp_bias",), ("mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj")),
    ),
    "falcon": (
        Carrier(
            ("bias",),
            ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
    ),
    "modernbert-decoder": (
        Carrier(("attention_bias",), ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.Wo")),
        Carrier(("mlp_bias",), ("mlp.Wi", "mlp.Wo")),
    ),
    # beside attention, or in its place
    "bamba": (_ATTENTION, _PROJECTIONS, _FEED_FORWARD),
    "falcon_h1": (_ATTENTION, Carrier(("projectors_bias",), ("mamba.out_proj",)), _FEED_FORWARD),
    "granitemoehybrid": (_ATTENTION, _PROJECTIONS),
    "jamba": (_PROJECTIONS,),
    "nemotron_h": (
        _MIXER,
        Carrier(("mlp_bias",), tuple(f"mixer.{at}{leaf}_proj" for at in ("", "shared_experts.") for leaf in ("up", "down"))),
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), (_MIXER,)),
    **dict.fromkeys(("lfm2", "lfm2_moe"), (_CONVOLUTION,)),
    "xlstm": (
        Carrier(
            ("use_bias",),
            (
                *(f"mlstm_layer.{leaf}" for leaf in ("q", "k", "v", "ogate_preact", "multihead_norm", "out_proj")),
                *("ffn.proj_up", "ffn.proj_up_gate", "ffn.proj_down", "norm_ffn", "norm_mlstm"),
            ),
        ),
    ),
}  # fmt: skip
"""Carriers by model type: all that give a writer a bias which joins the stream with no norm between."""

PARALLEL = frozenset({"cohere", "cohere2", "cohere2_moe", "cohere_compass_text"})
"""Types with a carrier whose blocks add attention and MLP at once: what either writes is the stream's from the block's end on."""


def bias_settings(
    checkpoint: Checkpoint, model_type: str, settings: Mapping[str, Any], prefix: str, layers: int
) -> tuple[BiasSetting, ...]:
    """The carriers of a checkpoint that are switched off. ``settings`` are its language model's; ``prefix`` its blocks'."""
    found = []
    for carrier in CARRIERS.get(model_type, ()):
        if any(settings.get(key) for key in carrier.keys):
            continue
        names = [name for layer in range(layers) for name in _modules(checkpoint, carrier, f"{prefix}{layer}.")]
        names += [name for name in carrier.around if f"{name}.weight" in checkpoint.tensors]
        creates = {f"{name}.bias": _info(checkpoint, name) for name in names}
        if names and not creates.keys() & checkpoint.tensors.keys():
            found.append(BiasSetting(carrier.keys, creates))
    return tuple(found)


def _modules(checkpoint: Checkpoint, carrier: Carrier, block: str) -> list[str]:
    if carrier.beside is not None and f"{block}{carrier.beside}.weight" not in checkpoint.tensors:
        return []
    return [f"{block}{leaf}" for leaf in carrier.leaves if f"{block}{leaf}.weight" in checkpoint.tensors]


def _info(checkpoint: Checkpoint, module: str) -> TensorInfo:
    weight = checkpoint.tensors[f"{module}.weight"]
    # of a quantised matrix: the dtype in which the model computes
    plain = (info.dtype for info in checkpoint.tensors.values() if info.dtype in EDITABLE and len(info.shape) == 1)
    dtype = weight.dtype if weight.dtype in EDITABLE else next(plain, "F32")
    return TensorInfo(
        f"{module}.bias", dtype, weight.shape[:1], "", 0, math.prod(weight.shape[:1]) * DTYPES[dtype].itemsize
    )
