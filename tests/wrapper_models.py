"""Tiny multimodal models around a language model, built from configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from family_configs import COMMON_SETTINGS, LINEAR
from family_models import renamed
from releases import config_class

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN = {"depth": 1, "num_heads": 2, "patch_size": 8}
_VIT = {**_QWEN, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
_CLIP, _SIGLIP = ({**VISION, "model_type": name} for name in ("clip_vision_model", "siglip_vision_model"))


def _around(text: dict[str, Any], vision: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **others}


WRAPPED: dict[str, dict[str, Any]] = {
    "aya_vision": _around({"model_type": "cohere2"}, _SIGLIP),
    "deepseek_vl": _around({"model_type": "llama"}, _SIGLIP),
    "exaone4_5": _around({"model_type": "exaone4"}, _VIT),
    "gemma3": _around({"model_type": "gemma3_text", "query_pre_attn_scalar": 16}, VISION, mm_tokens_per_image=4),
    "glm4v": _around(_MROPE, _VIT),
    "got_ocr2": _around({"model_type": "qwen2"}, {**VISION, "mlp_dim": 16, "output_channels": 16}),
    "idefics3": _around({"model_type": "llama"}, VISION),
    "internvl": _around({"model_type": "qwen2"}, {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}),
    "lfm2_vl": _around(
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
    ),
    "lighton_ocr": _around({"model_type": "qwen3"}, {**VISION, "model_type": "pixtral"}),
    "llava": _around({"model_type": "llama"}, _CLIP),
    "llava_next": _around({"model_type": "mistral"}, _CLIP),
    "llava_onevision": _around({"model_type": "qwen2"}, _SIGLIP),
    "mistral3": _around({"model_type": "mistral"}, {**VISION, "model_type": "pixtral"}),
    "paligemma": _around({"model_type": "gemma"}, _SIGLIP),
    "qwen2_vl": _around(_MROPE, {**_QWEN, "embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": _around(_MROPE, _VIT),
    "qwen3_5": _around({**_MROPE, **LINEAR}, _VIT),
    "qwen3_vl": _around(_MROPE, {**_VIT, "deepstack_visual_indexes": [0]}),
    "smolvlm": _around({"model_type": "llama"}, VISION),
    "video_llava": _around({"model_type": "llama"}, _CLIP),
    "vipllava": _around({"model_type": "llama"}, _CLIP),
}
"""What the config of each multimodal model needs: its language model beside the common settings, and its towers."""


def wrapper(folder: Path, model_type: str, **changes: Any) -> Path:
    """A multimodal wrapper around a tiny language model; ``changes`` go over its config, part by part."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    config = config_class(model_type)(**wrapper_settings(model_type, **changes))
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def wrapper_settings(model_type: str, **changes: Any) -> dict[str, Any]:
    """What the config of a multimodal model is made of."""
    settings = {"tie_word_embeddings": False, **WRAPPED[model_type]}
    settings["text_config"] = {**COMMON_SETTINGS, **settings["text_config"]}
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    return settings


def qwen2_vl_flat(folder: Path) -> Path:
    """The language model's settings beside ``vision_config``, as Qwen2-VL was published."""
    path = wrapper(folder, "qwen2_vl") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config.pop("text_config"), **config}))
    return folder


def gemma3_nested(folder: Path) -> Path:
    """Gemma 3 with the module's names on disk: ``model.language_model.layers``."""
    return renamed(
        wrapper(folder, "gemma3"), lambda name: name.replace("language_model.model.", "model.language_model.")
    )


WRAPPERS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: wrapper(folder, name) for name in WRAPPED},  # type: ignore[misc]
    "gemma3-nested": gemma3_nested,
    "qwen2_vl-flat": qwen2_vl_flat,
}
