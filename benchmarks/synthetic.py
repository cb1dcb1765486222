"""Random checkpoints of any size, of a llama or of a mixture with fused experts. Also statistics and plans for them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from steer2edit.architecture import MatrixRole, ModelSpec
from steer2edit.capture.moments import Moments, Resampled
from steer2edit.capture.populations import POPULATIONS, RESAMPLES, SOURCES, Kind, Population, Side, Source
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import INDEX, Checkpoint
from steer2edit.plan import Base, EditPlan, LowRank

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 8, 32000
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 128, 8, 512
Layer = Callable[[int], list[tuple[str, tuple[int, ...]]]]
_SCALE = 0.02
_CHUNK = 1 << 24


def make_checkpoint(folder: Path, gigabytes: float, shard_gigabytes: float = 1.0) -> Path:
    """Write a bfloat16 checkpoint of about ``gigabytes`` (10⁹ bytes) in shards, or reuse one; memory stays small."""
    layers = _layers(gigabytes, _layer)
    folder = folder / f"llama-{gigabytes:g}gb"
    return _make(folder, list(_tensors(layers, _layer)), shard_gigabytes, _llama_config(layers))


def make_mixture(folder: Path, gigabytes: float, shard_gigabytes: float = 1.0) -> Path:
    """The same for a mixture of ``EXPERTS`` experts a layer, whose matrices lie in one tensor [experts, out, in]."""
    layers = _layers(gigabytes, _mixture_layer)
    folder = folder / f"mixture-{gigabytes:g}gb"
    return _make(folder, list(_tensors(layers, _mixture_layer)), shard_gigabytes, _mixture_config(layers))


def make_gpt_oss(folder: Path, gigabytes: float, shard_gigabytes: float = 1.0) -> Path:
    """The same as a gpt_oss, whose experts have biases, as the router has, and matrices [experts, in, out]."""
    layers = _layers(gigabytes, _gpt_oss_layer)
    folder = folder / f"gpt_oss-{gigabytes:g}gb"
    return _make(folder, list(_tensors(layers, _gpt_oss_layer)), shard_gigabytes, _gpt_oss_config(layers))


def _layers(gigabytes: float, layer: Layer) -> int:
    return max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * HIDDEN * 2) / (2 * _count(layer(0)))))


def _make(
    folder: Path, tensors: list[tuple[str, tuple[int, ...]]], shard_gigabytes: float, config: dict[str, object]
) -> Path:
    if (folder / INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    shards = list(_sharded(tensors, shard_gigabytes * 1e9))
    pool = (torch.randn(2 * _CHUNK) * _SCALE).bfloat16()
    for number, inside in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, inside, pool)
        weight_map |= {tensor: name for tensor, _ in inside}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    # last, for it is what marks the folder as complete
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def random_plan(checkpoint: Checkpoint, spec: ModelSpec, roles: Collection[MatrixRole], norm: float = 0.5) -> EditPlan:
    """A rank-1 edit of Frobenius norm ``norm`` on every residual writer of ``roles``."""
    generator = torch.Generator().manual_seed(0)

    def direction(size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator)
        unit: torch.Tensor = values / torch.linalg.vector_norm(values)
        return unit

    edits = [
        LowRank(site.matrix, direction(site.out_features)[:, None], norm * direction(site.in_features)[None])
        for site in spec.sites
        if site.role.kind in roles
    ]
    return EditPlan(Base(checkpoint.name, checkpoint.revision, checkpoint.fingerprint), tuple(edits))


def random_statistics(checkpoint: Checkpoint, spec: ModelSpec) -> Statistics:
    """Statistics of the right shapes, with everything that a capture keeps: planning takes as long whatever the numbers are."""
    generator = torch.Generator().manual_seed(1)
    keys = [(site.key, "input", site.in_features) for site in spec.sites]
    keys += [(site.key, "output", site.out_features) for site in spec.sites]
    keys += [(f"residual.{layer}", "output", spec.hidden_size) for layer in range(spec.layers)]
    moments: dict[tuple[str, Side, Population], Moments] = {}
    resampled: dict[tuple[Kind, str, Side], Resampled] = {}
    for key, side, size in keys:
        for population in POPULATIONS:
            mean = torch.randn(size, generator=generator, dtype=torch.float64)
            moments[key, side, population] = Moments(mean, mean.square() + 1)  # type: ignore[index]
        for kind, count in RESAMPLES.items():
            drawn = torch.randn(count, 2, size, generator=generator)
            resampled[kind, key, side] = Resampled(drawn)  # type: ignore[index]
    blocks: dict[tuple[str, Source], torch.Tensor] = {}
    for site in spec.sites:
        if site.heads is not None:
            for source in SOURCES:
                rows = torch.randn(site.heads, 32, site.in_features // site.heads, generator=generator)
                blocks[site.key, source] = rows.transpose(1, 2) @ rows / 32
    described = {"name": "random", "fingerprint": checkpoint.fingerprint, "model": checkpoint.name}
    counts = dict.fromkeys(POPULATIONS, 1)
    weights = {kind: torch.ones(count, 2) for kind, count in RESAMPLES.items()}
    return Statistics(moments, counts, dict(counts), described, blocks, resampled, weights)


def _layer(number: int) -> list[tuple[str, tuple[int, ...]]]:
    kv = HIDDEN // HEADS * KV_HEADS
    prefix = f"model.layers.{number}."
    return [
        (prefix + "input_layernorm.weight", (HIDDEN,)),
        (prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)),
        (prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)),
        (prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)),
        (prefix + "post_attention_layernorm.weight", (HIDDEN,)),
        (prefix + "self_attn.k_proj.weight", (kv, HIDDEN)),
        (prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
        (prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
        (prefix + "self_attn.v_proj.weight", (kv, HIDDEN)),
    ]


def _mixture_layer(number: int) -> list[tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{number}."
    kept = [entry for entry in _layer(number) if ".mlp." not in entry[0]]
    return [
        *kept,
        (prefix + "block_sparse_moe.input_linear.weight", (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN)),
        (prefix + "block_sparse_moe.output_linear.weight", (EXPERTS, HIDDEN, EXPERT_WIDTH)),
        (prefix + "block_sparse_moe.router.layer.weight", (EXPERTS, HIDDEN)),
    ]


def _gpt_oss_layer(number: int) -> list[tuple[str, tuple[int, ...]]]:
    prefix, kv = f"model.layers.{number}.", HIDDEN // HEADS * KV_HEADS
    return [
        *(entry for entry in _layer(number) if ".mlp." not in entry[0]),
        (prefix + "mlp.experts.down_proj", (EXPERTS, EXPERT_WIDTH, HIDDEN)),
        (prefix + "mlp.experts.down_proj_bias", (EXPERTS, HIDDEN)),
        (prefix + "mlp.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * EXPERT_WIDTH)),
        (prefix + "mlp.experts.gate_up_proj_bias", (EXPERTS, 2 * EXPERT_WIDTH)),
        (prefix + "mlp.router.bias", (EXPERTS,)),
        (prefix + "mlp.router.weight", (EXPERTS, HIDDEN)),
        *((f"{prefix}self_attn.{name}_proj.bias", (kv if name in "kv" else HIDDEN,)) for name in "koqv"),
        (prefix + "self_attn.sinks", (HEADS,)),
    ]


def _tensors(layers: int, layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for number in range(layers):
        yield from layer(number)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _count(tensors: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() for _, shape in tensors)


def _sharded(tensors: list[tuple[str, tuple[int, ...]]], limit: float) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    shard: list[tuple[str, tuple[int, ...]]] = []
    for tensor in tensors:
        if shard and 2 * _count([*shard, tensor]) > limit:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], pool: torch.Tensor) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in tensors:
            left = torch.Size(shape).numel()
            if len(shape) == 1:  # a norm's gain
                file.write(_raw(torch.ones(shape, dtype=torch.bfloat16)))
                continue
            # slices of one pool of random numbers, each tensor's from another place
            first = zlib.crc32(name.encode()) % _CHUNK
            while left:
                count = min(left, _CHUNK)
                file.write(_raw(pool[first : first + count]))
                left -= count
    return end


def _raw(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _llama_config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _mixture_config(layers: int) -> dict[str, object]:
    return {
        **_llama_config(layers),
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "intermediate_size": EXPERT_WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
    }


def _gpt_oss_config(layers: int) -> dict[str, object]:
    return {
        **_mixture_config(layers),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": HIDDEN // HEADS,
        "attention_bias": True,
    }


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "the", "is"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
