"""Compare a checkpoint's tensors with those that its model needs, by their names.

Blocks of one kind have tensors of the same names, so a name that most of them have is missing in the others. What all blocks
lack is noticed when the model is loaded.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from steer2edit.architecture.config import (
    HIDDEN,
    TEXT_CONFIGS,
    TextConfig,
    class_defaults,
    head_count,
    head_size,
    integer,
    layer_values,
)
from steer2edit.architecture.families import WRITER_LEAVES
from steer2edit.architecture.family import Family
from steer2edit.architecture.sites import Site
from steer2edit.checkpoint import Checkpoint

# buffers that older files hold and no loader needs
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias|rotary_emb\..*|position_ids)$")
_ALIKE = 0.6
_NUMBERED = re.compile(r"\bexperts\.(\d+)\.")


def missing_in_blocks(
    checkpoint: Checkpoint, prefix: str, sites: Sequence[Site], family: Family, values: Mapping[str, Any], layers: int
) -> list[str]:
    """Tensors that a block lacks and at least half of the blocks of its kind have.

    Blocks are of one kind where the config calls them so, they have the same writers, and most of their names agree.
    """
    leaves = _leaves(checkpoint, prefix, layers)
    kinds = values.get("layer_types")
    by_layer = defaultdict(set)
    for site in sites:
        by_layer[site.layer].add((site.role, _NUMBERED.sub("experts.", _leaf(site.tensor, prefix))))
    problems = []
    by_kind: dict[object, list[int]] = defaultdict(list)
    sharing = values.get("num_kv_shared_layers")
    for layer in range(layers):
        named = kinds[layer] if isinstance(kinds, list) and len(kinds) == layers else None
        # the last layers of Gemma 4 use the keys and values of earlier ones, and have no matrices for them
        shares = isinstance(sharing, int) and layer >= layers - sharing
        by_kind[str(named), shares, frozenset(by_layer[layer])].append(layer)
    for alike in by_kind.values():
        # experts are compared among themselves
        named_leaves = {layer: {_NUMBERED.sub("experts.", leaf) for leaf in leaves[layer]} for layer in alike}
        for layer, own in named_leaves.items():
            kin = [one for other, one in named_leaves.items() if other != layer and _are_alike(own, one)]
            counts = Counter(leaf for one in kin for leaf in one - own)
            lacking = [leaf for leaf, count in counts.items() if 2 * count >= len(kin)]
            problems += [
                f"layer {layer}: {prefix}{layer}.{leaf} is missing; blocks of its kind have it"
                for leaf in sorted(lacking)
                if leaf.removesuffix(".weight") not in family.may_lack
            ]
            problems += [
                f"layer {layer}: {prefix}{layer}.{leaf} is missing" for leaf in _missing_experts(leaves[layer])
            ]
    return problems


def _are_alike(one: set[str], other: set[str]) -> bool:
    """Whether two blocks have most of their tensors' names in common: linear and full attention, say, do not."""
    return len(one & other) >= _ALIKE * len(one | other)


def missing_around(
    checkpoint: Checkpoint, prefix: str, family: Family, config: Mapping[str, Any], model_type: str
) -> list[str]:
    """The norm after the last block and the unembedding, where the model needs them and the checkpoint lacks them."""
    problems = []
    norm = f"{around(prefix)}{family.final_norm}.weight"
    if family.final_norm is not None and norm not in checkpoint.tensors:
        problems.append(f"{norm} is missing (the norm after the last block)")
    if _needs_head(config, model_type) and not _has_head(checkpoint, family):
        problems.append(
            f"{family.head}.weight is missing (the unembedding): the config does not tie it to the embedding "
            "(tie_word_embeddings), so it would be random"
        )
    return problems


def key_shapes(checkpoint: Checkpoint, text: TextConfig, prefix: str, layers: int) -> list[str]:
    """Key and value matrices that do not fit the number of heads that a config without num_key_value_heads means."""
    values, types = text.values, class_defaults(text.model_type)
    if "num_key_value_heads" in text.given or not types or values.get("v_head_dim") is not None:
        return []
    heads = head_count(values, optional=True)
    own = values.get("num_key_value_heads") is not None
    groups = integer(values, "num_key_value_heads") if own else heads
    rows = groups * head_size(values, integer(values, *HIDDEN), heads)
    alike = [layer for layer in range(layers) if layer_values(values, layer) is values]
    names = [f"{prefix}{layer}.self_attn.{leaf}_proj.weight" for layer in alike for leaf in "kv"]
    shapes = {name: checkpoint.tensors[name].shape for name in names if name in checkpoint.tensors}
    return [
        f"{name} has the shape {list(shape)}; expected {rows} rows: config.json gives no num_key_value_heads, which "
        f"means {groups} heads for keys and values"
        for name, shape in shapes.items()
        if rows and shape[:1] != (rows,)
    ]


def around(prefix: str) -> str:
    """The prefix of what is around the blocks, in a checkpoint whose blocks have this one: ``model.`` for ``model.layers.``."""
    return "".join(prefix.removesuffix(".").rpartition(".")[:2])


def left_over(checkpoint: Checkpoint, prefix: str, layers: int, claimed: set[str]) -> list[str]:
    """Matrices of the blocks that are named as a writer and belong to no site."""
    # fused experts are parameters of their own, without ``.weight``
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.(.+?)(?:\.weight)?")
    problems = []
    for name, info in checkpoint.tensors.items():
        match = pattern.fullmatch(name)
        if match and int(match.group(1)) < layers and name not in claimed and len(info.shape) >= 2:
            leaf = match.group(2).rsplit(".", 1)[-1]
            if leaf in WRITER_LEAVES:
                problems.append(f"layer {match.group(1)}: {name} looks like a writer and belongs to no site")
    return problems


def is_tied(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any]) -> bool:
    """Whether embedding and unembedding are one matrix."""
    flags = _tie_flags(config)
    # a wrapper and its text config may disagree
    return any(flags) if flags else not _has_head(checkpoint, family)


def _needs_head(config: Mapping[str, Any], model_type: str) -> bool:
    """Whether the config says everywhere that the unembedding is a matrix of its own.

    Where the config says nothing, its class decides.
    """
    types = {model_type, str(config.get("model_type") or model_type)}
    stated = [part.get("tie_word_embeddings") for part in _parts(config)]
    defaults = [class_defaults(name).get("tie_word_embeddings") for name in types]
    if any(flag is True for flag in stated):
        return False
    return all(flag is False for flag in stated) or all(flag is False for flag in defaults)


def _tie_flags(config: Mapping[str, Any]) -> list[bool]:
    return [part["tie_word_embeddings"] for part in _parts(config) if part.get("tie_word_embeddings") is not None]


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict))]


def head_tensor(checkpoint: Checkpoint, family: Family) -> str | None:
    """The name of the unembedding's matrix; None where the file has none."""
    names = (
        f"{inside}{head}.weight"
        for inside in ("", "language_model.", "text_model.", "model.")
        for head in (family.head, "lm_head")
    )
    return next((name for name in names if name in checkpoint.tensors), None)


def _has_head(checkpoint: Checkpoint, family: Family) -> bool:
    return head_tensor(checkpoint, family) is not None


def _leaves(checkpoint: Checkpoint, prefix: str, layers: int) -> dict[int, set[str]]:
    """The names of each block's tensors inside the block."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.(.+)")
    leaves: dict[int, set[str]] = {layer: set() for layer in range(layers)}
    for name in checkpoint.tensors:
        match = pattern.fullmatch(name)
        if match and (layer := int(match[1])) < layers and not _BUFFERS.search(match[2]):
            leaves[layer].add(match[2])
    return leaves


def _missing_experts(leaves: Iterable[str]) -> Iterator[str]:
    """What some experts of a block have and others lack."""
    named = [(match, leaf) for leaf in leaves if (match := _NUMBERED.search(leaf))]
    experts: dict[str, set[str]] = defaultdict(set)
    for match, leaf in named:
        experts[leaf[: match.start(1)] + match[1]].add(leaf[match.end() :])
    everything = {leaf for own in experts.values() for leaf in own}
    for expert, own in sorted(experts.items()):
        yield from (
            f"{expert}.{leaf}" for leaf in sorted(everything - own) if leaf.rsplit(".", 2)[-2] not in WRITER_LEAVES
        )


def _leaf(tensor: str, prefix: str) -> str:
    return tensor.removeprefix(prefix).partition(".")[2]
