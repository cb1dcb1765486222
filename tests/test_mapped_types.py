"""Every text model that transformers maps is described, or refused with a reason.

A type that a new release of transformers brings fails here by its name. Describe it in ``architecture/families.py`` or
``mixtures.py``, or refuse it in ``refusals.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from steer2edit.architecture.find_family import KNOWN
from steer2edit.architecture.refusals import REFUSED
from steer2edit.architecture.wrappers import MULTIMODAL

# neither described nor refused yet: the list only gets shorter
PENDING_TEXT: set[str] = set()
PENDING_WRAPPERS = {
    *("apertus1p5", "aria", "blip", "blip-2", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_edge"),
    *("cosmos3_omni", "deepseek_ocr2", "deepseek_vl_hybrid", "diffusion_gemma", "dots3_note", "emu3"),
    *(
        "ernie4_5_vl_moe",
        "evolla",
        "fast_vlm",
        "florence2",
        "fuyu",
        "gemma4",
        "gemma4_unified",
        "git",
        "glm46v",
        "glm4v_moe",
    ),
    *("glm_ocr", "glmga", "granite4_vision", "granite_docling", "hunyuan_vl", "hy_v4_vl", "hyperclovax_vision_v2"),
    *("idefics", "idefics2", "inkling2", "inkling2_loop", "inkling_mm_model", "instructblip", "instructblipvideo"),
    *("janus", "kimi_k25", "kosmos-2", "kosmos-2.5", "lfm3_vl", "llama4", "llava_next_video", "minicpm_ocr"),
    *("minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral_large4", "molmo2", "muse_glimmer", "muse_spark"),
    *("nemotron_h_omni", "ovis2", "paddleocr_vl", "perception_lm", "pi0", "pix2struct", "pp_chart2table"),
    *("pp_formulanet", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen3_5_moe", "qwen3_omni_moe_thinker"),
    *("qwen3_vl_moe", "qwen4_exp", "shieldgemma2", "step3p7", "t5gemma2", "udop", "unlimited_ocr", "video_llama_3"),
    "vision-encoder-decoder",
}


def mapped() -> Iterator[str]:
    """The causal and image-text model types of the installed transformers."""
    yield from MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    yield from MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def described() -> set[str]:
    return {*MULTIMODAL, *(name for family in KNOWN for name in family.model_types)}


def test_every_type_that_transformers_maps_is_described_or_refused() -> None:
    unknown = set(mapped()) - described() - set(REFUSED) - PENDING_TEXT - PENDING_WRAPPERS
    assert not unknown, f"neither described nor refused: {', '.join(sorted(unknown))}"


def test_no_type_is_described_and_refused_and_none_is_pending_that_is_either() -> None:
    assert not described() & set(REFUSED)
    assert not (PENDING_TEXT | PENDING_WRAPPERS) & (described() | set(REFUSED))


def test_every_refusal_has_a_reason_that_ends_its_message() -> None:
    for name, reason in REFUSED.items():
        assert len(reason.split()) > 4 and not reason.endswith("."), name
