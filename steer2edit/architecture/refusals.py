"""Refusals before a model's writers are looked for.

They concern model types whose layout cannot carry these edits, and formats and names that no loader takes for a plain model.
A type that transformers maps to a text model is described in ``families.py`` or ``mixtures.py``, or it is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from steer2edit.checkpoint import Checkpoint
from steer2edit.checkpoint.fp8 import SUFFIX, block_size
from steer2edit.checkpoint.quantised import READ, method_of
from steer2edit.errors import ArchitectureError

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"), "its AltUp streams and per-layer inputs are not a plain residual stream"
    ),
    "dory": "a norm and a rate for each channel shrink its whole residual stream before each writer's output joins it",
    "hrm_text": "two stacks of layers run again and again over their own streams, and an edit would act in every round",
    **dict.fromkeys(
        ("inkling_mm_model", "inkling_text"),
        "a convolution over several tokens stands between its writers and its residual stream",
    ),
    **dict.fromkeys(
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
        "its layers read weighted sums of the streams of earlier layers, and a convolution over tokens follows its writers",
    ),
    "longcat_flash": "experts without weights copy a layer's normalised input into its residual stream",
    "jetmoe": "its attention is a mixture of experts too: a router chooses each token's output matrices",
    "moss_transcribe_diarize": "it transcribes speech and takes no prompts of text alone",
    "gpt_neox_japanese": "its last block adds a bias that belongs to none of its writers",
    "blt": "it reads bytes in patches, through three models with streams of their own",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it drafts tokens for a Gemma 4 model out of that model's keys and values, and does not run without it",
    ),
    "cpmant": "its model class adds tokens of its own before the text, for which there are no labels",
    **dict.fromkeys(
        ("minimax", "zaya", "muse_spark", "muse_spark_text"),
        "its residual stream is rescaled by learned factors in every layer",
    ),
    **dict.fromkeys(
        ("deepseek_v4", "hy_v4", "hy_v4_vl", "hy_v4_vl_text", "glm5_next", "qwen4_exp", "qwen4_exp_text"),
        "its hyper-connections are not a plain residual stream",
    ),
    **dict.fromkeys(
        (
            *("openai-gpt", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
            *("rembert", "roberta", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlnet", "git"),
        ),
        "a norm rescales its whole residual stream in every block",
    ),
    **dict.fromkeys(
        ("megatron-bert", "roberta-prelayernorm", "xlm-roberta-xl", "xmod"),
        "it is an encoder: its published models fill masked tokens and write no text",
    ),
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            *("plbart", "prophetnet", "trocr", "whisper", "blip", "florence2", "pix2struct", "pp_formulanet"),
            *("t5gemma2", "udop", "vision-encoder-decoder"),
        ),
        "it is the decoder of an encoder-decoder model, whose blocks also write what they read from the encoder",
    ),
    **dict.fromkeys(
        ("moshi", "musicgen", "musicgen_melody"), "it writes the codes of an audio codec, several for each step"
    ),
    "reformer": "its reversible layers keep two residual streams",
    **dict.fromkeys(("zamba", "zamba2"), "several of its layers share one block, in all of which an edit would act"),
    "bitnet": "its matrices are rounded to three values when it runs, which would round a small edit away",
    **dict.fromkeys(
        ("mllama", "mllama_text_model", "idefics", "evolla"), "its cross-attention writes through learned gates"
    ),
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "kosmos-2"), "transformers does not run it without a picture"
    ),
    "voxtral_realtime": "transformers does not run it without sound",
    "kyutai_speech_to_text": "it reads the codes of an audio codec beside every token",
    "shieldgemma2": "transformers loads it as a classifier of pictures, which writes no text",
    "pi0": "it writes the movements of a robot and no text",
    **dict.fromkeys(
        ("diffusion_gemma", "diffusion_gemma_text"),
        "it writes a block of text at once, by diffusion, and not token by token",
    ),
    **dict.fromkeys(
        ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        "its experts for text and for pictures stand in one list under two routers, which is not described",
    ),
    **dict.fromkeys(
        ("molmo2", "molmo2_text"), "its token embedding lies in two tensors, and only plain matrices are described"
    ),
    "rwkv": "it rescales its residual stream every few layers",
    **dict.fromkeys(("diffllama", "doge"), "its attention heads are not separate blocks of input columns"),
}
"""Model types whose layout is known and cannot carry these edits, with the reason."""

_LAYOUTS: Mapping[str, tuple[str, bool, str]] = {
    "opt": ("do_layer_norm_before", False, "normalises the whole residual stream"),
    "chameleon": ("swin_norm", True, "has norms after its writers in place of those before its readers"),
}
"""Model types one setting of which gives blocks that are not described: the setting, its value then, and what it does."""

_QUANTISED = re.compile(
    r"(_blocks|_scales|\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_global_scale|absmax|SCB"
    r"|scales|_data|codes|trellis)|\.quant_state\..+)$"
)
_MXFP4_EXPERTS = re.compile(r"\bexperts\.\w+_(blocks|scales)$")
# what training code puts before or into the names of a model's tensors, and what did so
_PREFIXES = {
    re.compile(r"(^|\.)_orig_mod\."): ("_orig_mod.", "torch.compile"),
    re.compile(r"^module\."): ("module.", "torch's DataParallel"),
    re.compile(r"(^|\.)_fsdp_wrapped_module\."): ("_fsdp_wrapped_module.", "torch's FSDP"),
    re.compile(r"(^|\.)_checkpoint_wrapped_module\."): ("_checkpoint_wrapped_module.", "activation checkpointing"),
    re.compile(r"^_forward_module\."): ("_forward_module.", "Lightning"),
    re.compile(r"^base_model\.model\."): ("base_model.model.", "PEFT"),
}
_LORA = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module)\b"
)


def refuse_unfit(checkpoint: Checkpoint, model_types: tuple[str, ...], settings: Mapping[str, Any]) -> None:
    """Raise ArchitectureError for families known to be unfit, quantised weights, unmerged LoRAs and wrapped names.

    ``settings`` are the language model's, some of which make another layout of a described family.
    """
    for name in model_types:
        if name in REFUSED:
            raise ArchitectureError(f"{checkpoint.name} ({name}) cannot be compiled: {REFUSED[name]}")
        setting, value, why = _LAYOUTS.get(name, ("", None, ""))
        if setting and settings.get(setting, not value) is value:
            raise ArchitectureError(f"{checkpoint.name} {why} ({setting} is {str(value).lower()})")
    _refuse_quantised(checkpoint)
    _refuse_lora(checkpoint)
    _refuse_prefixes(checkpoint)


def _refuse_lora(checkpoint: Checkpoint) -> None:
    if names := _matching(checkpoint, _LORA.search):
        raise ArchitectureError(
            f"{checkpoint.name} holds an adapter that was not merged ({len(names)} tensors, such as {names[0]}): its layers are "
            "split into a base and an update; merge it with PEFT's merge_and_unload() and save the model again"
        )


def _refuse_prefixes(checkpoint: Checkpoint) -> None:
    for pattern, (prefix, origin) in _PREFIXES.items():
        if names := _matching(checkpoint, pattern.search):
            raise ArchitectureError(
                f"{checkpoint.name}: the names of {len(names)} of its {len(checkpoint.tensors)} tensors carry {prefix!r}, which "
                f"{origin} puts there and no loader expects, such as {names[0]}; save the model that is inside the wrapper, or "
                f"take {prefix!r} out of the names"
            )


def _matching(checkpoint: Checkpoint, matches: Callable[[str], object]) -> list[str]:
    return sorted(name for name in checkpoint.tensors if matches(name))


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse quantised formats that are not read.

    Read are fp8 with block scales, which is also edited, and the formats of ``checkpoint.quantised``, beside which adapters are
    written. mxfp4 experts stay as they are.
    """
    settings = checkpoint.config.get("quantization_config")
    marked = sorted(name for name in checkpoint.tensors if _QUANTISED.search(name))
    method = method_of(checkpoint.config)
    if block_size(checkpoint.config):
        marked = [name for name in marked if not name.endswith(SUFFIX)]
    elif method == "mxfp4" and marked:
        marked = [name for name in marked if not _MXFP4_EXPERTS.search(name)]
    elif (not settings and not marked) or (checkpoint.quantisation is not None and not marked):
        return
    else:
        marked = marked or ["by its config"]
    if not marked:
        return
    sign = marked[0] if marked == ["by its config"] else f"such as {marked[0]}"
    if checkpoint.quantisation is not None:
        raise ArchitectureError(
            f"{checkpoint.name} is quantised ({checkpoint.quantisation.text}), and holds tensors beside its matrices that change "
            f"what they compute and are not described, {sign}. Compile the unquantised model instead; a LoRA compiled from it "
            "also serves beside the quantised base."
        )
    if method in READ and marked == ["by its config"]:
        raise ArchitectureError(
            f"{checkpoint.name}: quantization_config in its config.json names {method}, and none of its tensors is quantised "
            "so. Take quantization_config out of config.json to compile the unquantised weights, or save the quantised model."
        )
    raise ArchitectureError(
        f"{checkpoint.name} is quantised ({method or 'unknown format'}, {sign}), in a format whose matrices are not read, and a "
        f"plan reads every matrix that it edits. Read are fp8 with weight_block_size, {', '.join(READ)}. Compile the "
        "unquantised model (bf16, f16 or f32) instead, and quantise the result; a LoRA compiled from it also serves beside the "
        "quantised base."
    )
