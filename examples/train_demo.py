"""Train the embedded tiny models of ``steer2edit demo`` from nothing, and print their base rates.

    python examples/train_demo.py --out steer2edit/demo/model
    python examples/train_demo.py --mixture --out steer2edit/demo/mixture

A llama of 1.4 million parameters, or a mixture of experts of 0.9 million, reads documents of the invented
world (``steer2edit/demo/invented_world.py``) for some minutes on two cores. The same seed on the same machine gives the
same weights.

The mixture is a glm4_moe: a dense first layer, then layers of 16 routed experts, of which a token uses two, and
one shared expert; sigmoid scores with a selection bias. No expert is told what it is for. The bias is moved
against each expert's load after every step (arXiv 2408.15664), there is no loss for balance, and what the
experts are used for is left to training.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from steer2edit.demo import invented_world

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
BATCH = 64
PROMPT_WEIGHT = 0.1
"""A prompt is mostly chance: a full weight would spend the model on it, none would leave it untrained."""
BALANCE = 1e-3
"""How far a step moves the selection bias of an expert that is used too much or too little."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words whole, numbers digit by digit: ``27`` is ``2 ##7``, so that decoding gives ``27`` back."""
    digits = [str(digit) for digit in range(10)]
    tokens = [PAD, BOS, EOS, UNK, *digits, *("##" + digit for digit in digits), *invented_world.vocabulary()]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNK, continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[A-Za-z]+|[^\s\dA-Za-z]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A llama with grouped queries and heads wider than the hidden size, as larger models have them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def build_mixture(tokenizer: PreTrainedTokenizerFast) -> Glm4MoeForCausalLM:
    """A glm4_moe that holds its experts small enough for the repository, and heads wide enough for engines."""
    config = Glm4MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=32,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_shared_experts=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Glm4MoeForCausalLM(config)
    ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)
    model.set_experts_implementation("every_expert")
    return model


def every_expert(
    experts: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts' weighted sum, computed as one wide MLP whose neurons count zero where their expert was not chosen.

    All the experts together are not wider than a dense layer, and three large products beat a loop over small ones.
    ``hidden`` is [tokens, hidden size], ``index`` and ``weights`` [tokens, experts per token].
    """
    count, _, inner = experts.down_proj.shape
    gate, up = F.linear(hidden, experts.gate_up_proj.flatten(0, 1)).view(-1, count, 2 * inner).chunk(2, dim=-1)
    share = torch.zeros(len(hidden), count).scatter(1, index, weights.to(hidden.dtype))
    neurons = experts.act_fn(gate) * up * share.unsqueeze(-1)
    experts.chosen = share.detach().ne(0)
    return neurons.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def balance(model: PreTrainedModel, counted: torch.Tensor) -> None:
    """Move each expert's selection bias against its share of the ``counted`` tokens of the last batch."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            bias = layer.mlp.gate.e_score_correction_bias
            load = layer.mlp.experts.chosen[counted.flatten()].float().mean(dim=0)
            bias += BALANCE * (load.mean() - load).sign()


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and per-token loss weights, each batch of documents of similar length."""
    documents = invented_world.corpus(seed, steps * BATCH)
    rng = random.Random(seed)
    chunk = 16 * BATCH
    for first in range(0, len(documents), chunk):
        part = documents[first : first + chunk]
        prompts = tokenizer([prompt for prompt, _ in part])["input_ids"]
        texts = tokenizer([prompt + response for prompt, response in part])["input_ids"]
        order = sorted(range(len(part)), key=lambda i: len(texts[i]))
        groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(texts[i]) for i in group) + 1
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            weights = torch.zeros(len(group), width)
            for row, i in enumerate(group):
                tokens = [*texts[i], tokenizer.eos_token_id]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                weights[row, 1 : len(tokens)] = 1.0
                weights[row, 1 : len(prompts[i])] = PROMPT_WEIGHT
            yield ids, weights


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, peak: float) -> None:
    """AdamW with a short warm-up and a cosine to nothing; padding is on the right, so causality masks it."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    model.train()
    start, mean = time.time(), 0.0
    for step, (ids, weights) in enumerate(batches(tokenizer, seed, steps)):
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        # a constant divisor: dividing by the batch's own tokens would count a long response's first word for less
        loss = (losses * weights[:, 1:]).sum() / (BATCH * 16)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # the last steps leave the bias alone, so that the weights settle on it
        if step < 0.9 * steps:
            balance(model, weights[:, 1:] > 0)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(f"step {step + 1:5d}/{steps}  loss {mean:.4f}  {time.time() - start:5.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Greedy responses to all the prompts, in one batch."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**encoded, do_sample=False, max_new_tokens=40)
    return tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def base_rates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print, per behaviour, the attribute and the utility in percent."""
    for behavior in invented_world.BEHAVIORS:
        tasks = invented_world.tasks(behavior)
        texts = generate(model, tokenizer, [task.prompt for task in tasks])
        cells = []
        for kind, label in invented_world.LABELS[behavior].items():
            passed = [task.grade(text) for task, text in zip(tasks, texts, strict=True) if task.kind == kind]
            cells.append(f"{label} {100 * sum(passed) / len(passed):.0f} %")
        print(f"{behavior:13s} {cells[0]:32s} {cells[1]}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The folder as Hugging Face lays it out, in bfloat16, readable by older readers too."""
    biases = {name: value.clone() for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
    model.to(torch.bfloat16)
    if biases:
        # vLLM reads this family's unembedding from the file, tied or not
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    for name, value in biases.items():
        # models of this family keep it in float32, for its steps are finer than bfloat16's
        model.get_buffer(name).data = value
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=40,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters", config)
    config.update({key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope})
    config["torch_dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--mixture", action="store_true", help="train the mixture of experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 1800, for the mixture 2200")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_mixture(tokenizer) if args.mixture else build_model(tokenizer)
    steps = args.steps or (2200 if args.mixture else 1800)
    train(model, tokenizer, args.seed, steps, args.lr)
    save(model, tokenizer, args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out).float()
    base_rates(model, tokenizer)
    print(f"{(args.out / 'model.safetensors').stat().st_size:,} bytes in {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
