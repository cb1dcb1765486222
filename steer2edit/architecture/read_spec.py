"""From config.json and the tensor index to a ModelSpec: every residual writer, its orientation and components.

No model code is imported and no weight is read. What is not understood is an error: a layer whose writers were
not all found, or a tensor that looks like a writer and belongs to no site, stops the compile.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from steer2edit.architecture.families import FAMILIES, LLAMA, REFUSED, WRAPPERS, WRITER_LEAVES, Family, Orientation
from steer2edit.architecture.mixtures import MIXTURES
from steer2edit.architecture.routers import Router, integer, read_router
from steer2edit.architecture.sites import MatrixRole, ModelSpec, Norm, Site, part_of
from steer2edit.checkpoint import EDITABLE, Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, SUFFIX, block_size, scale_info
from steer2edit.errors import ArchitectureError, CheckpointError, listing

__all__ = ["MatrixRole", "ModelSpec", "Norm", "Site", "read_spec"]

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
_MXFP4_EXPERTS = re.compile(r"\bexperts\.\w+_(blocks|scales)$")
# the vectors of a plain pre-norm block
_PLAIN_GAINS = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
_EXPERT = re.compile(r"\bexperts\b|\bblock_sparse_moe\b|\bshared_expert")
_KNOWN = (*FAMILIES, *MIXTURES)


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Find every residual writer and router of a checkpoint.

    Raises ArchitectureError, with all that is missing or left over, for quantised checkpoints, families known to be
    unfit, and layouts that no family describes.
    """
    config = checkpoint.config
    text = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    for name in (model_type, str(config.get("model_type"))):
        if name in REFUSED:
            raise ArchitectureError(f"{checkpoint.name} ({name}) cannot be compiled: {REFUSED[name]}")
    _refuse_quantised(checkpoint)
    hidden = integer(text, "hidden_size", "n_embd", "d_model")
    layers = _layers(text)
    heads = _heads(text, model_type)
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
    reader = _Reader(checkpoint, text, family, prefix, module, hidden, heads)
    for layer in range(layers):
        reader.layer(layer)
    problems = [*reader.problems, *_unclaimed(checkpoint, prefix, layers, reader.claimed)]
    if problems:
        raise ArchitectureError(
            f"{checkpoint.name} ({model_type or 'no model_type'}) does not match the {family.name} layout:\n{listing(problems)}"
        )
    return ModelSpec(
        model_type=model_type,
        family=family.name,
        hidden_size=hidden,
        layers=layers,
        sites=tuple(reader.sites),
        embedding=_embedding(checkpoint, family, prefix, module, hidden),
        tied_embeddings=_tied(checkpoint, config, text),
        block_modules=module,
        routers=tuple(reader.routers),
        frozen=tuple(reader.frozen),
    )


class _Reader:
    """Collects the writers of one checkpoint block by block, and everything that is wrong with them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Mapping[str, Any],
        family: Family,
        prefix: str,
        module: str,
        hidden: int,
        heads: int,
    ) -> None:
        self.checkpoint, self.text, self.family = checkpoint, text, family
        self.prefix, self.module, self.hidden, self.heads = prefix, module, hidden, heads
        self.sites: list[Site] = []
        self.routers: list[Router] = []
        self.problems: list[str] = []
        self.frozen: list[str] = []
        self.claimed: set[str] = set()

    def layer(self, layer: int) -> None:
        """Find the writers of a block: attention or another mixer, then an MLP or experts."""
        family, found = self.family, len(self.sites)
        for leaf in family.mixers:
            self._writer(
                layer, MatrixRole.MIXER_OUT, leaf, None if family.bare_mixers else family.attn_norm, optional=True
            )
        mixed = len(self.sites) > found
        mlp_norm = None if mixed and family.bare_mixers else family.mlp_norm
        if family.attn_out not in family.mixers:
            self._writer(
                layer, MatrixRole.ATTN_OUT, family.attn_out, family.attn_norm, optional=mixed or family.partial
            )
        routed = family.mixture is not None and self._experts(layer)
        # in granite's mixtures the shared expert has the place of a dense model's MLP
        if not (routed and family.mixture and family.mixture.shared == family.mlp_out):
            self._writer(layer, MatrixRole.MLP_OUT, family.mlp_out, mlp_norm, optional=routed or family.partial)
        if len(self.sites) == found and family.partial:
            self.problems.append(f"layer {layer}: no writer was found")

    def _writer(self, layer: int, role: MatrixRole, leaf: str, norm: str | None, *, optional: bool = False) -> None:
        base, family = f"{self.prefix}{layer}.", self.family
        info = self.checkpoint.tensors.get(f"{base}{leaf}.weight")
        if info is None:
            if not optional:
                self.problems.append(f"layer {layer}: {base}{leaf}.weight is missing ({role.value})")
            return
        heads = self.heads if role is MatrixRole.ATTN_OUT or leaf == family.attn_out else None
        width = _in_features(info, family.orientation)
        if leaf == family.attn_out and leaf in family.mixers:
            # one name for attention and for what stands in its place: only the widths tell them apart
            role, heads = (
                (MatrixRole.ATTN_OUT, heads)
                if width == self.heads * self._head_size()
                else (MatrixRole.MIXER_OUT, None)
            )
        bias = f"{base}{leaf}.bias"
        site = Site(
            role=role,
            layer=layer,
            tensor=info.name,
            module=f"{self.module}{layer}.{family.module(leaf)}",
            orientation=family.orientation,
            out_features=self.hidden,
            in_features=width,
            heads=heads,
            bias=bias if bias in self.checkpoint.tensors else None,
            norm=self._norm(layer, leaf, norm),
        )
        self._keep(site, info)

    def _experts(self, layer: int) -> bool:
        """Claim a block's experts and router, if it has them."""
        mixture = self.family.mixture
        assert mixture is not None
        base = f"{self.prefix}{layer}."
        router, problems = read_router(self.checkpoint, self.text, mixture, base, f"{self.module}{layer}.", layer)
        self.problems += problems
        if router is None:
            return bool(problems)
        self.routers.append(router)
        norm = mixture.norm or self.family.mlp_norm
        for expert in range(router.experts):
            name = f"{base}{mixture.output.format(e=expert)}"
            info = self.checkpoint.tensors.get(name)
            if info is None and f"{name}_blocks" in self.checkpoint.tensors:
                self.frozen.append(f"{name}_blocks")
                break
            if info is None:
                self.problems.append(f"layer {layer}: {name} is missing (expert {expert} of {router.experts})")
                if mixture.layout != "separate":
                    break
                continue
            part = None if mixture.layout == "separate" else (expert, router.experts)
            if part is not None and (not info.shape or info.shape[0] % router.experts):
                self.problems.append(
                    f"{name} has the shape {list(info.shape)}; expected {router.experts} experts on axis 0"
                )
                break
            orientation: Orientation = "out_in" if mixture.layout in ("separate", "out_in") else "in_out"
            output_bias = mixture.output_bias and f"{base}{mixture.output_bias}"
            site = Site(
                role=MatrixRole.EXPERT_OUT,
                layer=layer,
                tensor=name,
                module=router.experts_module,
                orientation=orientation,
                out_features=self.hidden,
                in_features=_in_features(part_of(info, part), orientation),
                bias=output_bias if output_bias in self.checkpoint.tensors else None,
                norm=self._norm(layer, "the experts", norm),
                expert=expert,
                part=part,
            )
            self._keep(site, info)
        if mixture.shared is not None:
            self._writer(layer, MatrixRole.SHARED_EXPERT_OUT, mixture.shared, norm, optional=True)
        return True

    def _norm(self, layer: int, leaf: str, norm: str | None) -> Norm | None:
        if norm is None:
            return None
        name = f"{self.prefix}{layer}.{norm}.weight"
        other = f"{self.prefix}{layer}.{self.family.norm_aliases.get(norm, norm)}.weight"
        if name not in self.checkpoint.tensors and other in self.checkpoint.tensors:
            name = other
        if name not in self.checkpoint.tensors:
            self.problems.append(f"layer {layer}: {name} is missing (the norm after {leaf})")
        return Norm(name, self.family.norm_offset)

    def _keep(self, site: Site, info: TensorInfo) -> None:
        self.claimed.add(info.name)
        self.sites.append(site)
        self.problems += _check_matrix(site, self.checkpoint, self._head_size())

    def _head_size(self) -> int:
        if not self.heads:
            return 0
        given = [key for key in ("v_head_dim", "head_dim") if self.text.get(key) is not None]
        return integer(self.text, *given) if given else self.hidden // self.heads


def _find_family(checkpoint: Checkpoint, model_type: str, layers: int, wrapped: bool) -> tuple[Family, str, str]:
    """The family, the prefix of its blocks on disk (``model.layers.``), and that of their modules."""
    by_type = next((family for family in _KNOWN if model_type in family.model_types), None)
    # unknown types may follow the common names; only llama's are free of traps of orientation and norms
    family = by_type or LLAMA
    writers = [f"{leaf}.weight" for leaf in (family.attn_out, *family.mixers)]
    for prefix, module in _prefixes(family, wrapped):  # noqa: B007
        hits = [i for i in range(layers) if any(f"{prefix}{i}.{leaf}" in checkpoint.tensors for leaf in writers)]
        if hits:
            break
    else:
        prefix, module = _prefixes(family, wrapped)[0]
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
    """Every vector of the blocks that is no bias: the gains of norms, and whatever else scales a stream."""
    block = re.compile(re.escape(prefix) + r"\d+\.(.+)")
    found = ((block.fullmatch(name), info) for name, info in checkpoint.tensors.items())
    names = {match.group(1) for match, info in found if match and len(info.shape) < 2}
    return {name.removesuffix(".weight") for name in names if not name.endswith(".bias")}


def _prefixes(family: Family, wrapped: bool) -> list[tuple[str, str]]:
    tail = family.blocks.split(".", 1)[1]
    # a wrapper's file may have the bare model's names, its modules are always nested
    module = f"model.language_model.{tail}." if wrapped else f"{family.blocks}."
    prefixes = [(f"{family.prefix or family.blocks}.", module)]
    prefixes += [(f"{on_disk}{tail}.", f"{nested}{tail}.") for on_disk, nested in _LANGUAGE_PREFIXES]
    # files saved from the bare model without its head, such as gpt2's
    return [*prefixes, (f"{tail}.", module)]


def _not_understood(checkpoint: Checkpoint, model_type: str, strange: set[str]) -> str:
    known = [name for family in _KNOWN for name in family.model_types]
    near = difflib.get_close_matches(model_type, known, n=1, cutoff=0.0)
    block = re.compile(r"^(.*?\b(?:layers|h|blocks|layer)\.)(\d+)\.(.+)$")
    inside = sorted({m.group(3) for name in checkpoint.tensors if (m := block.match(name)) and m.group(2) == "0"})
    why = f"; its vectors {', '.join(sorted(strange))} are not described" if strange else ""
    return (
        f"{checkpoint.name}: the model type {model_type!r} is not known{why}. The nearest known family is "
        f"{near[0]!r}. Tensors of layer 0:\n{listing(inside, 30)}\n"
        "Add an entry to steer2edit/architecture/families.py that names its writers."
    )


def _check_matrix(site: Site, checkpoint: Checkpoint, head_size: int) -> list[str]:
    problems, info = [], site.locate(checkpoint)
    if info.dtype == FP8 and len(info.shape) == 2:
        try:
            scale_info(checkpoint, info)
        except CheckpointError as error:
            problems.append(str(error))
    elif info.dtype not in EDITABLE:
        problems.append(f"{info.name} is stored as {info.dtype}; editable are {', '.join(sorted(EDITABLE))}")
    axis = 0 if site.orientation == "out_in" else 1
    if len(info.shape) != 2 or 0 in info.shape or info.shape[axis] != site.out_features:
        problems.append(f"{info.name} has the shape {list(info.shape)}; expected {site.out_features} on axis {axis}")
    elif site.heads is not None and site.heads * head_size != site.in_features:
        problems.append(f"{info.name} has {site.in_features} input columns; expected {site.heads} heads of {head_size}")
    return problems


def _unclaimed(checkpoint: Checkpoint, prefix: str, layers: int, claimed: set[str]) -> list[str]:
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


def _embedding(checkpoint: Checkpoint, family: Family, prefix: str, module: str, hidden: int) -> Site:
    leaf = family.embedding.removeprefix(family.blocks.rsplit(".", 1)[0] + ".")
    blocks = family.blocks.rsplit(".", 1)[-1] + "."
    name = f"{prefix.removesuffix(blocks)}{family.disk_embedding or leaf}.weight"
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2 or info.shape[1] != hidden:
        shape = "is missing" if info is None else f"has the shape {list(info.shape)}"
        raise ArchitectureError(f"{name} {shape}; expected the token embedding, [vocabulary, {hidden}]")
    # a row per token: read as a matrix, it maps a one-hot token to the stream and is stored input × output
    return Site(MatrixRole.EMBED, 0, name, module.removesuffix(blocks) + leaf, "in_out", hidden, info.shape[0])


def _tied(checkpoint: Checkpoint, config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    heads = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight")
    flags = [part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None]
    # a wrapper and its text config may disagree
    return any(flags) if flags else not any(name in checkpoint.tensors for name in heads)


def _heads(text: Mapping[str, Any], model_type: str) -> int:
    """How many attention heads there are; 0 in a model that has none."""
    if any(family.partial and model_type in family.model_types for family in _KNOWN):
        names = ("num_attention_heads", "n_head")
        return integer(text, *names) if any(text.get(name) is not None for name in names) else 0
    return integer(text, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")


def _layers(text: Mapping[str, Any]) -> int:
    kinds = text.get("layers_block_type")
    if isinstance(kinds, list) and kinds and text.get("num_hidden_layers") is None:
        return len(kinds)
    return integer(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse every quantised format but fp8 with block scales, which is edited, and mxfp4 experts, which stay as they are."""
    settings = checkpoint.config.get("quantization_config")
    marked = sorted(name for name in checkpoint.tensors if _QUANTISED.search(name))
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if block_size(checkpoint.config):
        marked = [name for name in marked if not name.endswith(SUFFIX)]
    elif method == "mxfp4" and marked:
        marked = [name for name in marked if not _MXFP4_EXPERTS.search(name)]
    elif not settings and not marked:
        return
    else:
        marked = marked or ["by its config"]
    if not marked:
        return
    sign = marked[0] if marked == ["by its config"] else f"such as {marked[0]}"
    raise ArchitectureError(
        f"{checkpoint.name} is quantised ({method or 'unknown format'}, {sign}). Compile the unquantised model "
        "(bf16, f16 or f32, or fp8 with weight_block_size) instead, and quantise the result; a LoRA compiled from it also serves "
        "beside the quantised base."
    )


def _in_features(info: TensorInfo, orientation: Orientation) -> int:
    shape = info.shape or (0,)
    return shape[-1] if orientation == "out_in" else shape[0]
