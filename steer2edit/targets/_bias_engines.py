"""What engines do with a bias that no published model of a type has.

Some read the setting, some refuse it, some pass over it.

docs/engines.md has the runs. A type that stands nowhere here was not run, or acted as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from steer2edit.architecture import MatrixRole

_ATTENTION, _BOTH = frozenset({MatrixRole.ATTN_OUT}), frozenset({MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT})

PASSED_OVER_IN_VLLM: Mapping[str, frozenset[MatrixRole]] = {
    **dict.fromkeys(
        (
            *("qwen3", "qwen3_moe", "gemma", "cohere", "cohere2", "cohere2_moe", "olmoe"),
            *("granitemoe", "granitemoeshared", "granitemoe_swa"),
        ),
        _ATTENTION,
    ),
    "ernie4_5": _BOTH,
    "falcon_h1": _BOTH | {MatrixRole.MIXER_OUT},
}
"""Writers by type whose new biases vLLM 0.32 was seen to load and pass over: it answers as the base does."""

READ_IN_VLLM: Mapping[str, frozenset[MatrixRole]] = {
    **dict.fromkeys(("qwen3_next", "ernie4_5_moe", "deepseek_v3", "glm4_moe_lite"), _ATTENTION),
    **dict.fromkeys(("minicpm3", "deepseek_v2", "hy_v3"), _BOTH),
}
"""The same by vLLM's source: it builds these writers without a bias."""

REFUSED_BY_LLAMACPP = frozenset(
    (
        *("qwen3", "gemma", "cohere", "cohere2", "hunyuan_v1_dense", "olmo", "qwen3_moe", "olmoe", "smollm3", "arcee"),
        *("seed_oss", "ernie4_5", "falcon", "dots1", "hunyuan_v1_moe", "deepseek_v2", "deepseek_v3"),
    )
)
"""Types whose base llama.cpp was seen to run, and whose new biases its converter or its loader refused."""


_NAMES = {
    MatrixRole.ATTN_OUT: "attention's",
    MatrixRole.MIXER_OUT: "the mixers'",
    MatrixRole.MLP_OUT: "the MLPs'",
}


def remarks(model_type: str, roles: Iterable[MatrixRole]) -> list[str]:
    """What a receipt says of engines that do not run new biases of these writers."""
    lines, chosen = [], frozenset(roles)
    for table, how in ((PASSED_OVER_IN_VLLM, "as it was seen"), (READ_IN_VLLM, "by its source")):
        if lost := chosen & table.get(model_type, frozenset()):
            names = " and ".join(sorted(_NAMES[role] for role in lost))
            lines.append(
                f"vLLM 0.32 passes over {names} new biases, {how}: it loads this checkpoint and answers as the base does. Plan "
                "with --stand-in for it."
            )
    if model_type in REFUSED_BY_LLAMACPP:
        lines.append(
            f"llama.cpp refuses new biases in a {model_type} model: use --to gguf-vector, or plan with --stand-in."
        )
    return lines
