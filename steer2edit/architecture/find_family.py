"""The family of a checkpoint's model, and the prefixes of its blocks.

One prefix is that of tensors on the disk, the other that of modules.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from steer2edit.architecture.config import table_source
from steer2edit.architecture.families import FAMILIES, GRANITE_MULTIPLIERS, LLAMA
from steer2edit.architecture.family import Family
from steer2edit.architecture.mixtures import MIXTURES
from steer2edit.architecture.wrappers import LANGUAGE_MODULE, OTHER_MODULES, PREFIXES
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import ArchitectureError, listing

KNOWN = (*FAMILIES, *MIXTURES)
"""Every family that is described."""
# unknown types may follow the common names; only llama's are free of traps of orientation and norms
_UNKNOWN = replace(LLAMA, multipliers=GRANITE_MULTIPLIERS, final_norm=None)
# the vectors of a plain pre-norm block
_PLAIN_GAINS = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
_EXPERT = re.compile(r"\bexperts\b|\bblock_sparse_moe\b|\bshared_expert")


def family_of(model_type: str) -> Family | None:
    """The family that describes a model type; None for a type that no family names."""
    return next((family for family in KNOWN if model_type in family.model_types), None)


def find_family(checkpoint: Checkpoint, model_type: str, layers: int, wrapped: bool) -> tuple[Family, str, str]:
    """The family, the prefix of its blocks on disk (``model.layers.``), and that of their modules."""
    outer = str(checkpoint.config.get("model_type"))
    # a wrapper may rename the tensors of a known language model
    by_type = family_of(outer) or family_of(model_type)
    family = by_type or _UNKNOWN
    writers = [f"{leaf}.weight" for leaf in (family.attn_out, *family.mixers)]
    places = _prefixes(family, wrapped, outer)
    for prefix, module in places:  # noqa: B007
        hits = [i for i in range(layers) if any(f"{prefix}{i}.{leaf}" in checkpoint.tensors for leaf in writers)]
        if hits:
            break
    else:
        prefix, module = places[0]
        hits = []
    experts = [] if family.mixture else sorted(name for name in checkpoint.tensors if _EXPERT.search(name))
    if experts:
        raise ArchitectureError(
            f"{checkpoint.name} ({model_type}) is a mixture of experts ({len(experts)} expert tensors, such as {experts[0]}) "
            "that is not described; add an entry to steer2edit/architecture/mixtures.py that names its experts and routers"
        )
    if by_type is None:
        strange = _gains(checkpoint, prefix) - _PLAIN_GAINS
        if len(hits) < layers or strange:
            raise ArchitectureError(_not_understood(checkpoint, model_type, strange))
    return family, prefix, module


def _gains(checkpoint: Checkpoint, prefix: str) -> set[str]:
    """The vectors of the blocks that are not biases: gains of norms, and others that may scale a stream."""
    block = re.compile(re.escape(prefix) + r"\d+\.(.+)")
    matches = ((block.fullmatch(name), info) for name, info in checkpoint.tensors.items())
    names = {match.group(1) for match, info in matches if match and len(info.shape) < 2}
    return {name.removesuffix(".weight") for name in names if not name.endswith(".bias")}


def _prefixes(family: Family, wrapped: bool, outer: str) -> list[tuple[str, str]]:
    tail = family.blocks.split(".", 1)[1]
    # a wrapper's file may have the bare model's names, its modules are always nested
    module = f"{OTHER_MODULES.get(outer, LANGUAGE_MODULE)}{tail}." if wrapped else f"{family.blocks}."
    prefixes = [(f"{family.prefix or family.blocks}.", module)]
    prefixes += [(f"{on_disk}{tail}.", f"{OTHER_MODULES.get(outer, nested)}{tail}.") for on_disk, nested in PREFIXES]
    # files saved from the bare model without its head, such as gpt2's
    return [*prefixes, (f"{tail}.", module)]


def _not_understood(checkpoint: Checkpoint, model_type: str, strange: set[str]) -> str:
    known = [name for family in KNOWN for name in family.model_types]
    near = difflib.get_close_matches(model_type, known, n=1, cutoff=0.0)
    block = re.compile(r"^(.*?\b(?:layers|h|blocks|layer)\.)(\d+)\.(.+)$")
    inside = sorted({m.group(3) for name in checkpoint.tensors if (m := block.match(name)) and m.group(2) == "0"})
    why = f"; its vectors {', '.join(sorted(strange))} are not described" if strange else ""
    if checkpoint.config.get("auto_map"):
        why += "; its code comes with it (auto_map in config.json)"
    if written := checkpoint.config.get("transformers_version"):
        why += f"; its config.json was written by transformers {str(written)[:40]}, this list was made from {table_source()}"
    return (
        f"{checkpoint.name}: the model type {model_type!r} is not known{why}. The nearest known family is "
        f"{near[0]!r}. Tensors of layer 0:\n{listing(inside, 30)}\n"
        "Add an entry to steer2edit/architecture/families.py that names its writers."
    )
