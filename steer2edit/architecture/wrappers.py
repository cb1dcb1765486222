"""Multimodal models: which are described, and where each keeps its language model.

A wrapper holds a language model beside what sees and hears. Its checkpoint's names and the modules that transformers makes of
it differ: what transformers renames when it loads is undone here, so that names on disk stay the base's.
"""

from __future__ import annotations

from collections.abc import Mapping

MULTIMODAL = (
    *("aya_vision", "deepseek_vl", "exaone4_5", "gemma3", "glm4v", "got_ocr2", "idefics3", "internvl", "lfm2_vl"),
    *("lighton_ocr", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_5", "qwen3_vl", "smolvlm", "video_llava", "vipllava"),
)
"""Multimodal models whose language model is compiled in its place, each tested; others around a known family work alike."""

FLAT = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Wrappers whose config may be flat: others say that they are wrappers by nesting the language model's config."""

LANGUAGE_MODULE = "model.language_model."
"""Where transformers puts the language model of a wrapper, unless said otherwise."""

PREFIXES = (
    ("language_model.model.", LANGUAGE_MODULE),
    ("model.language_model.", LANGUAGE_MODULE),
    ("model.text_model.", "model.text_model."),
)
"""What stands before a language model's names in a wrapper: on disk, and in transformers."""

OTHER_MODULES: Mapping[str, str] = {}
"""Wrappers whose language model is in another module of transformers than its name on disk says."""
