"""mlx-lm's cells: the merged checkpoint, and the base with our adapters, one after the other.

    venv-mlx/bin/python benchmarks/engines/run_mlx.py WORK [CASE …]

Everything runs in float32. *quantised* is the base in MLX's 4 bits with an adapter beside it, against the same rounded weights in
float32 with that adapter: what is left says how far the adapter depends on the base's format.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from records import TOP, Record, arguments, cases, cell, compare, keep, reference

# what mlx-lm wants in the config of a published model, which transformers 5 writes no more
PUBLISHED: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "exaone4": {"sliding_window_pattern": "LLLG"},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
}
GROUP = 32
ADAPTERS = ("first", "second", "both")


def main(work: Path, chosen: list[str]) -> None:
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    for case in cases(work):
        if chosen and case["key"] not in chosen:
            continue
        expected = reference(work, case["key"])
        folders = case["artefacts"]
        runs = {
            "merged": (folders["first checkpoint"], None, "merged"),
            "base": (case["base"], None, "base"),
            **{label: (case["base"], folders.get(f"{label} mlx", "error: not emitted"), label) for label in ADAPTERS},
        }
        if "experts" in expected:
            runs["experts"] = (case["base"], folders["experts mlx"], "experts")
        cells = {
            label: cell(lambda case=case, expected=expected, run=run: _compared(case, expected, *run))  # type: ignore[misc]
            for label, run in runs.items()
        }
        cells |= _quantised(case)
        keep(work, "mlx", case["key"], cells, versions)
        print(case["name"], {name: one.get("largest", one.get("error")) for name, one in cells.items()}, flush=True)


def _compared(
    case: dict[str, Any], expected: dict[str, list[Record]], folder: str, adapter: str | None, label: str
) -> dict[str, Any]:
    model = _model(folder)
    return compare(_ask(_adapted(model, adapter) if adapter else model, case), expected[label])


def _quantised(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The adapter beside a base in 4 bits, against the same rounded weights in float32; and its effect there."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_unflatten

    def chosen(_: str, module: Any) -> bool:
        # embeddings stay: as unembeddings they would be multiplied in another order
        return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0

    def run() -> tuple[list[Record], ...]:
        rounded, plain = _model(case["base"]), _model(case["base"])
        nn.quantize(rounded, GROUP, 4, class_predicate=chosen)
        for name, module in rounded.named_modules():
            if isinstance(module, nn.QuantizedLinear):
                weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
                plain.update(tree_unflatten([(f"{name}.weight", weight)]))
        base = _ask(rounded, case)
        adapter = case["artefacts"].get("first mlx", "error: not emitted")
        return base, _ask(_adapted(rounded, adapter), case), _ask(_adapted(plain, adapter), case)

    try:
        base, rounded, plain = run()
    except Exception as error:  # of whatever an engine cannot do with a model
        reason = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}
        return {"quantised": reason, "effect when quantised": reason}
    return {"quantised": compare(rounded, plain), "effect when quantised": compare(rounded, base)}


def _model(folder: str) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    config = json.loads((Path(folder) / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        place = (
            _gpt_oss_as_published(Path(folder), Path(scratch)) if config["model_type"] == "gpt_oss" else Path(folder)
        )
        model, _ = load_model(place, model_config=_published(config))
    model.set_dtype(mx.float32)
    return model


def _gpt_oss_as_published(folder: Path, copy: Path) -> Path:
    """A copy whose experts are called and laid out as in mlx-lm's own copies.

    Of others it reads those in MXFP4 alone.
    """
    import mlx.core as mx

    shutil.copyfile(folder / "config.json", copy / "config.json")
    tensors: dict[str, Any] = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        before, _, last = name.rpartition(".")
        matrix = not last.endswith("_bias")
        # gate and up take turns on the last axis
        if last.startswith("gate_up_proj"):
            parts = {"gate_proj": value[..., ::2], "up_proj": value[..., 1::2]}
        elif last.startswith("down_proj"):
            parts = {"down_proj": value}
        else:
            tensors[name] = value
            continue
        for part, half in parts.items():
            # matrices lie input x output
            laid = half.swapaxes(-1, -2) if matrix else half
            tensors[f"{before}.{part}.{'weight' if matrix else 'bias'}"] = mx.contiguous(laid)
    mx.save_safetensors(str(copy / "model.safetensors"), tensors)
    return copy


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """Settings as published configs have them, which transformers 5 writes in one table."""
    rope = config.get("rope_parameters") or {}
    # one table for each kind of layer: mlx-lm has a setting of its own for the sliding ones
    flat = rope.get("full_attention") or rope
    kinds = ("rope_theta", "partial_rotary_factor")
    settings = {name: flat[name] for name in kinds if name in flat and name not in config}
    if "head_dim" not in config and "num_attention_heads" in config and "hidden_size" in config:
        settings["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if "num_local_experts" in config:
        settings["num_experts"] = config["num_local_experts"]
    if config["model_type"] == "lfm2":
        settings["block_dim"] = config["hidden_size"]
    if config["model_type"] == "mamba2":
        settings["intermediate_size"] = config["expand"] * config["hidden_size"]
    if "per_layer_config" in config:
        settings["global_head_dim"] = next(iter(config["per_layer_config"].values())).get("head_dim")
    if "rope_scaling" not in config:
        settings["rope_scaling"] = None
    if "text_config" in config:
        text = config["text_config"]
        settings |= {"text_config": {**text, **_published(text)}, "vocab_size": text.get("vocab_size")}
    return {**settings, **PUBLISHED.get(config["model_type"], {})}


def _adapted(model: Any, adapter: str) -> Any:
    from mlx_lm.utils import load_adapters

    if adapter.startswith("error"):
        raise RuntimeError(adapter.removeprefix("error: "))
    adapted = load_adapters(model, adapter)
    adapted.eval()
    return adapted


def _ask(model: Any, case: dict[str, Any]) -> list[Record]:
    """Greedy continuations, with the ``TOP`` most likely tokens of every step."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.cache import make_prompt_cache

    answers = []
    for prompt in case["prompts"]:
        record: Record = {"prompt": prompt, "tokens": [], "top": []}
        cache, ids = make_prompt_cache(model), prompt
        for _ in range(case["tokens"]):
            scores = nn.log_softmax(model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32), axis=-1)
            best = mx.argsort(-scores)[:TOP].tolist()
            record["top"].append([[token, float(scores[token])] for token in best])
            record["tokens"].append(best[0])
            ids = best[:1]
        answers.append(record)
    return answers


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    main(given.work, given.cases)
