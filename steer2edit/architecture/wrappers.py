"""Multimodal models: which are described, and where each keeps its language model.

A wrapper holds a language model beside what sees and hears. Its checkpoint's names and the modules that transformers makes of
it differ: what transformers renames when it loads is undone here, so that names on disk stay the base's.
"""

from __future__ import annotations

from collections.abc import Mapping

MULTIMODAL = (
    *("apertus1p5", "aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass"),
    *("cosmos3_edge", "cosmos3_omni"),
    *("deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "dots3_note", "emu3", "exaone4_5"),
    *("fast_vlm", "fun_asr_nano", "fuyu", "gemma3", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe"),
    *("glm_ocr", "glmasr", "glmga", "got_ocr2", "granite4_vision", "granite_docling", "granite_speech"),
    *("granite_speech_plus", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl"),
    *("janus", "kimi_k25", "kosmos-2.5", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next"),
    *("llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl"),
    *("mistral3", "mistral_large4", "muse_glimmer", "nemotron_h_omni", "omniasr", "ovis2", "paddleocr_vl"),
    *("paligemma", "perception_lm", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl"),
    *("qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl"),
    *("qwen3_vl_moe", "smolvlm", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava", "vipllava", "voxtral"),
)
"""Multimodal models whose language model is compiled in its place, each tested; others around a known family work alike."""

FLAT = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Wrappers whose config may be flat: others say that they are wrappers by nesting the language model's config."""

LANGUAGE_MODULE = "model.language_model."
"""Where transformers puts the language model of a wrapper, unless said otherwise."""

PREFIXES = (
    ("language_model.model.", LANGUAGE_MODULE),
    # transformers 5.15 saves models that hear with one level more, and every release loads both
    ("language_model.model.model.", LANGUAGE_MODULE),
    ("model.language_model.", LANGUAGE_MODULE),
    ("model.text_model.", "model.text_model."),
    ("text_model.model.", "model.text_model."),
    ("language_model.backbone.", "language_model.model."),
)
"""What stands before a language model's names in a wrapper: on disk, and in transformers."""

OTHER_MODULES: Mapping[str, str] = {
    "emu3": "model.text_model.",
    "kosmos-2.5": "text_model.model.",
    "nemotron_h_omni": "language_model.model.",
    # of the language model alone
    "llama4": "model.",
}
"""Wrappers whose language model is in another module of transformers than its name on disk says."""

TEXT_ALONE = frozenset({"llama4"})
"""Wrappers of whose files transformers loads the language model alone, as AutoModelForCausalLM.

The whole Llama 4 model runs in no pass of transformers 5.24, with pictures or without.
"""
