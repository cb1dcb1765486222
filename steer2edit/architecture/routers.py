"""Routers of a mixture of experts: what config.json and the tensor index say of one layer's routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steer2edit.architecture.config import EXPERT_COUNTS, TOP_K, integer
from steer2edit.architecture.family import Mixture
from steer2edit.checkpoint import EDITABLE, Checkpoint


@dataclass(frozen=True)
class Router:
    """One layer's routing: ``experts`` of which ``top_k`` are taken for each token.

    ``tensor`` [experts, hidden] gives the logits. ``bias`` [experts] (None where there is none) takes part in the selection
    alone, or with ``bias_of`` "logits" is added to the logits. With ``groups`` over 1 the experts are ranked by group
    first, and ``top_groups`` groups are kept. ``folder`` is the prefix on disk of the tensors that each expert has for itself,
    ``fused`` those that hold a part for each expert along their first axis. ``input_norm`` is a LayerNorm with a bias before
    the router. ``experts_module`` and ``router_module`` are modules of transformers, and so is ``input_module``, whose input
    the rows of ``tensor`` are multiplied by.
    """

    layer: int
    experts: int
    top_k: int
    tensor: str
    folder: str | None
    fused: tuple[str, ...]
    experts_module: str
    router_module: str
    input_module: str
    bias: str | None = None
    bias_of: Literal["scores", "logits"] = "scores"
    groups: int = 1
    top_groups: int = 1
    input_norm: str | None = None


def read_router(
    checkpoint: Checkpoint, text: Mapping[str, Any], mixture: Mixture, base: str, module: str, layer: int
) -> tuple[Router | None, list[str]]:
    """The router of the block at ``base`` on disk and ``module`` in transformers; None where the block is dense.

    Also what is wrong: a router without experts or experts without a router, shapes that do not fit the config.
    """
    router, experts = f"{base}{mixture.router}", sorted(_experts(checkpoint, mixture, base))
    if router not in checkpoint.tensors:
        return None, [f"layer {layer}: {experts[0]} is there, and {router} is missing"] if experts else []
    if not experts:
        return None, [f"layer {layer}: {router} is there, and no {base}{mixture.output} is"]
    counts, per_token = routing_config(text)
    count, top_k = next(iter(counts.values()), 0), next(iter(per_token.values()), 0)
    problems, info = [], checkpoint.tensors[router]
    if not count or not top_k:
        problems.append(
            f"config.json gives no number of experts ({', '.join(EXPERT_COUNTS)}) or of experts per token ({', '.join(TOP_K)})"
        )
    elif len(info.shape) != 2 or info.shape[0] != count or info.dtype not in EDITABLE:
        problems.append(
            f"{router} is {info.dtype} {list(info.shape)}; expected {count} rows in {', '.join(sorted(EDITABLE))}"
        )
    bias = None if mixture.bias is None else f"{base}{mixture.bias}"
    if bias is not None and mixture.bias_flag is not None and text.get(mixture.bias_flag) is False:
        bias = None
    if bias is not None and bias not in checkpoint.tensors:
        problems.append(f"layer {layer}: {bias} is missing (the bias of the selection)")
    elif bias is not None and checkpoint.tensors[bias].shape not in ((count,), (1, count)):
        problems.append(f"{bias} has the shape {list(checkpoint.tensors[bias].shape)}; expected {count} values")
    if problems:
        return None, problems
    groups, top_groups = _groups(text)
    block = f"{module}{mixture.block}." if mixture.block else module
    result = Router(
        layer=layer,
        experts=count,
        top_k=top_k,
        tensor=router,
        folder=base + mixture.output.partition("{e}")[0] if mixture.layout == "separate" else None,
        fused=_fused(checkpoint, mixture, base),
        experts_module=f"{block}experts",
        router_module=f"{block}{mixture.router_module}",
        input_module=f"{block}{mixture.router_input or mixture.router_module}",
        bias=bias,
        bias_of=mixture.bias_of,
        groups=groups,
        top_groups=top_groups,
        input_norm=None if mixture.input_norm is None else f"{base}{mixture.input_norm}",
    )
    return result, []


def routing_config(text: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The config's keys for the number of experts and for that of experts per token, with their values.

    A key may stand in a nested ``ffn_config``, and is then called ``ffn_config.moe_top_k``. Raises ArchitectureError for
    values that are not positive whole numbers.
    """
    places = [("", text)]
    if isinstance(text.get("ffn_config"), dict):
        places.append(("ffn_config.", text["ffn_config"]))
    counts, per_token = (
        {f"{path}{key}": _single(place, key) for path, place in places for key in keys if place.get(key) is not None}
        for keys in (EXPERT_COUNTS, TOP_K)
    )
    return counts, per_token


def _single(config: Mapping[str, Any], key: str) -> int:
    """A whole number, or the one value of a list with one for each layer."""
    value = config[key]
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        return integer({key: value[0]}, key)
    return integer(config, key)


def _experts(checkpoint: Checkpoint, mixture: Mixture, base: str) -> list[str]:
    name = f"{base}{mixture.output.format(e=0)}"
    # in mxfp4 a tensor is two, of blocks and of their scales
    return [one for one in (name, f"{name}_blocks") if one in checkpoint.tensors]


def _fused(checkpoint: Checkpoint, mixture: Mixture, base: str) -> tuple[str, ...]:
    if mixture.layout == "separate":
        return ()
    named = (mixture.output, mixture.output_bias, *mixture.fused_inputs)
    # a quantised tensor is several, each named after it
    heads = tuple(f"{base}{name}" for name in named if name)
    names = (name for name in checkpoint.tensors if name in heads or name.startswith(tuple(f"{h}_" for h in heads)))
    return tuple(sorted(names))


def _groups(text: Mapping[str, Any]) -> tuple[int, int]:
    key = "n_group" if text.get("n_group") is not None else "num_expert_group"
    # DeepSeek-V2 has the numbers of groups also where its method of selection does not use them
    if text.get(key) is None or text.get("topk_method") == "greedy":
        return 1, 1
    groups = integer(text, key)
    return groups, integer(text, "topk_group") if groups > 1 else 1
