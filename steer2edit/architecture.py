"""From config.json and the tensor index to a ModelSpec: every residual writer, its orientation and components.

No model code is imported and no weight is read. What is not understood is an error: a layer whose writers were
not all found, or a tensor that looks like a writer and belongs to no site, stops the compile.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from steer2edit.checkpoint import EDITABLE, Checkpoint, TensorInfo
from steer2edit.errors import ArchitectureError, listing
from steer2edit.families import FAMILIES, LLAMA, REFUSED, WRAPPERS, WRITER_LEAVES, Family, Orientation

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# where wrappers put the language model: (prefix on disk, prefix of the module in transformers)
_LANGUAGE_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "model.language_model."),
    ("model.text_model.", "model.text_model."),
)
_QUANTISED = re.compile(
    r"(_blocks|_scales|\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_global_scale|absmax|SCB"
    r"|scales|_data|codes|trellis)|\.quant_state\..+)$"
)
# the vectors of a plain pre-norm block
_PLAIN_GAINS = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
_EXPERT = re.compile(r"\bexperts\b|\bblock_sparse_moe\b|\bshared_expert")


class Role(str, Enum):
    """What a site is to the residual stream."""

    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    EMBED = "embed"


@dataclass(frozen=True)
class Norm:
    """A norm between a writer's output and the stream; its gain is ``offset`` + the tensor's values."""

    tensor: str
    offset: float


@dataclass(frozen=True)
class Site:
    """One weight matrix at the residual stream.

    ``in_features`` and ``out_features`` are those of ``y = W x`` whatever the file's ``orientation``. ``heads`` is the
    number of attention heads, each a block of ``in_features / heads`` input columns, and None for an MLP, whose
    components are its single input columns.
    """

    role: Role
    layer: int
    tensor: str
    module: str
    orientation: Orientation
    out_features: int
    in_features: int
    heads: int | None = None
    bias: str | None = None
    norm: Norm | None = None

    @property
    def key(self) -> str:
        """Stable name used in statistics and plans: ``attn_out.3``."""
        return f"{self.role.value}.{self.layer}"

    @property
    def components(self) -> int:
        """How many components (heads or neurons) are scored here."""
        return self.heads if self.heads is not None else self.in_features


@dataclass(frozen=True)
class ModelSpec:
    """What the compiler knows of a model: ``sites`` are the writers, attention before MLP, layer by layer."""

    model_type: str
    family: str
    hidden_size: int
    layers: int
    sites: tuple[Site, ...]
    embedding: Site
    tied_embeddings: bool
    block_modules: str

    def site(self, key: str) -> Site:
        """The writer called ``key``; KeyError where there is none."""
        return self._by_key[key]

    def layer_range(self, chosen: tuple[int, int] | None) -> tuple[int, int]:
        """First and last layer of ``chosen``, or of the whole model. Raises ArchitectureError where they are not there."""
        first, last = chosen or (0, self.layers - 1)
        if not 0 <= first <= last < self.layers:
            raise ArchitectureError(f"layers {first}-{last} are not all in this model, which has 0-{self.layers - 1}")
        return first, last

    @property
    def _by_key(self) -> Mapping[str, Site]:
        return {site.key: site for site in self.sites}


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Find every residual writer of a checkpoint.

    Raises ArchitectureError, with all that is missing or left over, for quantised checkpoints, mixtures of
    experts, families known to be unfit, and layouts that no family describes.
    """
    config = checkpoint.config
    text = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    for name in (model_type, str(config.get("model_type"))):
        if name in REFUSED:
            raise ArchitectureError(f"{checkpoint.name} ({name}) cannot be compiled: {REFUSED[name]}")
    _refuse_quantised(checkpoint)
    hidden = _integer(text, "hidden_size", "n_embd", "d_model")
    layers = _integer(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = _integer(text, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    if layers > len(checkpoint.tensors):
        raise ArchitectureError(
            f"config.json gives {checkpoint.name} {layers} layers, its files hold {len(checkpoint.tensors)} tensors"
        )
    if model_type == "opt" and not text.get("do_layer_norm_before", True):
        raise ArchitectureError(
            f"{checkpoint.name} normalises the whole residual stream (do_layer_norm_before is false)"
        )

    wrapped = text is not config or model_type in WRAPPERS
    family, prefix, module = _find_family(checkpoint, model_type, layers, wrapped)
    sites, problems, claimed = [], [], set()
    for layer in range(layers):
        for role, leaf, norm in (
            (Role.ATTN_OUT, family.attn_out, family.attn_norm),
            (Role.MLP_OUT, family.mlp_out, family.mlp_norm),
        ):
            base = f"{prefix}{layer}."
            info = checkpoint.tensors.get(f"{base}{leaf}.weight")
            if info is None:
                problems.append(f"layer {layer}: {base}{leaf}.weight is missing ({role.value})")
                continue
            claimed.add(info.name)
            bias = f"{base}{leaf}.bias"
            if norm is not None and f"{base}{norm}.weight" not in checkpoint.tensors:
                problems.append(f"layer {layer}: {base}{norm}.weight is missing (the norm after {leaf})")
            site = Site(
                role=role,
                layer=layer,
                tensor=info.name,
                module=f"{module}{layer}.{leaf}",
                orientation=family.orientation,
                out_features=hidden,
                in_features=_in_features(info, family.orientation),
                heads=heads if role is Role.ATTN_OUT else None,
                bias=bias if bias in checkpoint.tensors else None,
                norm=Norm(f"{base}{norm}.weight", family.norm_offset) if norm else None,
            )
            sites.append(site)
            problems += _check_matrix(info, site, text)
    problems += _unclaimed(checkpoint, prefix, layers, claimed)
    if problems:
        raise ArchitectureError(
            f"{checkpoint.name} ({model_type or 'no model_type'}) does not match the {family.name} layout:\n{listing(problems)}"
        )
    return ModelSpec(
        model_type=model_type,
        family=family.name,
        hidden_size=hidden,
        layers=layers,
        sites=tuple(sites),
        embedding=_embedding(checkpoint, family, prefix, module, hidden),
        tied_embeddings=_tied(checkpoint, config, text),
        block_modules=module,
    )


def _find_family(checkpoint: Checkpoint, model_type: str, layers: int, wrapped: bool) -> tuple[Family, str, str]:
    """The family, the prefix of its blocks on disk (``model.layers.``), and that of their modules."""
    by_type = next((family for family in FAMILIES if model_type in family.model_types), None)
    # unknown types may follow the common names; only llama's are free of traps of orientation and norms
    family = by_type or LLAMA
    for prefix, module in _prefixes(family, wrapped):  # noqa: B007
        hits = [i for i in range(layers) if f"{prefix}{i}.{family.attn_out}.weight" in checkpoint.tensors]
        if hits:
            break
    else:
        prefix, module = _prefixes(family, wrapped)[0]
        hits = []
    experts = sorted(name for name in checkpoint.tensors if _EXPERT.search(name))
    if experts:
        raise ArchitectureError(
            f"{checkpoint.name} ({model_type}) is a mixture of experts ({len(experts)} expert tensors, such as {experts[0]}); "
            "this version compiles dense models only"
        )
    if by_type is None:
        strange = _gains(checkpoint, prefix) - _PLAIN_GAINS
        if len(hits) < layers or strange:
            raise ArchitectureError(_not_understood(checkpoint, model_type, strange))
    return family, prefix, module


def _gains(checkpoint: Checkpoint, prefix: str) -> set[str]:
    """Every vector of the blocks that is no bias: the gains of norms, and whatever else scales a stream."""
    block = re.compile(re.escape(prefix) + r"\d+\.(.+)")
    found = ((block.fullmatch(name), info) for name, info in checkpoint.tensors.items())
    names = {match.group(1) for match, info in found if match and len(info.shape) < 2}
    return {name.removesuffix(".weight") for name in names if not name.endswith(".bias")}


def _prefixes(family: Family, wrapped: bool) -> list[tuple[str, str]]:
    tail = family.blocks.split(".", 1)[1]
    # a wrapper's file may have the bare model's names, its modules are always nested
    module = f"model.language_model.{tail}." if wrapped else f"{family.blocks}."
    prefixes = [(f"{family.blocks}.", module)]
    prefixes += [(f"{on_disk}{tail}.", f"{nested}{tail}.") for on_disk, nested in _LANGUAGE_PREFIXES]
    # files saved from the bare model without its head, such as gpt2's
    return [*prefixes, (f"{tail}.", module)]


def _not_understood(checkpoint: Checkpoint, model_type: str, strange: set[str]) -> str:
    known = [name for family in FAMILIES for name in family.model_types]
    near = difflib.get_close_matches(model_type, known, n=1, cutoff=0.0)
    block = re.compile(r"^(.*?\b(?:layers|h|blocks|layer)\.)(\d+)\.(.+)$")
    inside = sorted({m.group(3) for name in checkpoint.tensors if (m := block.match(name)) and m.group(2) == "0"})
    why = f"; its vectors {', '.join(sorted(strange))} are not described" if strange else ""
    return (
        f"{checkpoint.name}: the model type {model_type!r} is not known{why}. The nearest known family is "
        f"{near[0]!r}. Tensors of layer 0:\n{listing(inside, 30)}\nAdd an entry to steer2edit/families.py that names its writers."
    )


def _check_matrix(info: TensorInfo, site: Site, text: Mapping[str, Any]) -> list[str]:
    problems = []
    if info.dtype not in EDITABLE:
        problems.append(f"{info.name} is stored as {info.dtype}; editable are {', '.join(sorted(EDITABLE))}")
    axis = 0 if site.orientation == "out_in" else 1
    if len(info.shape) != 2 or 0 in info.shape or info.shape[axis] != site.out_features:
        problems.append(f"{info.name} has the shape {list(info.shape)}; expected {site.out_features} on axis {axis}")
    elif site.heads is not None:
        given = [key for key in ("v_head_dim", "head_dim") if text.get(key) is not None]
        size = _integer(text, *given) if given else site.out_features // site.heads
        if site.heads * size != site.in_features:
            problems.append(f"{info.name} has {site.in_features} input columns; expected {site.heads} heads of {size}")
    return problems


def _unclaimed(checkpoint: Checkpoint, prefix: str, layers: int, claimed: set[str]) -> list[str]:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.(.+)\.weight")
    problems = []
    for name, info in checkpoint.tensors.items():
        match = pattern.fullmatch(name)
        if match and int(match.group(1)) < layers and name not in claimed and len(info.shape) >= 2:
            leaf = match.group(2).rsplit(".", 1)[-1]
            if leaf in WRITER_LEAVES:
                problems.append(f"layer {match.group(1)}: {name} looks like a writer and belongs to no site")
    return problems


def _embedding(checkpoint: Checkpoint, family: Family, prefix: str, module: str, hidden: int) -> Site:
    leaf = family.embedding.rsplit(".", 1)[-1]
    root = prefix.removesuffix(family.blocks.rsplit(".", 1)[-1] + ".")
    info = checkpoint.tensors.get(f"{root}{leaf}.weight")
    if info is None or len(info.shape) != 2 or info.shape[1] != hidden:
        shape = "is missing" if info is None else f"has the shape {list(info.shape)}"
        raise ArchitectureError(f"{root}{leaf}.weight {shape}; expected the token embedding, [vocabulary, {hidden}]")
    path = module.removesuffix(family.blocks.rsplit(".", 1)[-1] + ".") + leaf
    # a row per token: read as a matrix, it maps a one-hot token to the stream and is stored input × output
    return Site(Role.EMBED, 0, info.name, path, "in_out", hidden, info.shape[0])


def _tied(checkpoint: Checkpoint, config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    heads = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight")
    flags = [part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None]
    # a wrapper and its text config may disagree
    return any(flags) if flags else not any(name in checkpoint.tensors for name in heads)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config.get("quantization_config")
    marked = sorted(name for name in checkpoint.tensors if _QUANTISED.search(name))
    if not settings and not marked:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    sign = f"such as {marked[0]}" if marked else "by its config"
    raise ArchitectureError(
        f"{checkpoint.name} is quantised ({method or 'unknown format'}, {sign}). Compile the unquantised model "
        "(bf16, f16 or f32) instead, and quantise the result; a LoRA compiled from it also serves beside the quantised base."
    )


def _in_features(info: TensorInfo, orientation: Orientation) -> int:
    shape = info.shape or (0,)
    return shape[-1] if orientation == "out_in" else shape[0]


def _integer(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24:
            return value
        if value is not None:
            raise ArchitectureError(f"config.json: {key} is {value!r}, expected a positive whole number")
    raise ArchitectureError(f"config.json has no {' or '.join(keys)}")
