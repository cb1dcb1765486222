"""The model card of an artefact: what it is, how to load it, what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint

_COMPILED = (
    "with a steering vector compiled into its weights by steer2edit: no training, no hooks, no changed architecture."
)


@dataclass(frozen=True)
class _Kind:
    """How the Hub files a target's artefact, and what it is in words."""

    said: str
    relation: str | None
    library: str
    tags: tuple[str, ...] = ()


_KINDS: Mapping[str, _Kind] = {
    "checkpoint": _Kind(f"A checkpoint {_COMPILED}", "finetune", "transformers"),
    "lora": _Kind(f"A LoRA adapter {_COMPILED}", "adapter", "peft", ("lora",)),
    "gguf": _Kind(f"A LoRA adapter for llama.cpp {_COMPILED}", "adapter", "gguf", ("lora", "gguf")),
    "gguf-vector": _Kind(
        "A control vector for llama.cpp, made by steer2edit: run-time steering with the mean push of a compiled edit.",
        "adapter",
        "gguf",
        ("control-vector", "gguf"),
    ),
}


def model_card(receipt: Mapping[str, Any], spec: ModelSpec, checkpoint: Checkpoint) -> str:
    """The text of ``README.md``, with the Hub's metadata block."""
    from huggingface_hub import ModelCardData

    target = receipt["target"]
    kind = _KINDS[target]
    base = receipt["base"]
    data = ModelCardData(
        base_model=base["name"] if "/" in base["name"] else None,
        base_model_relation=kind.relation if "/" in base["name"] else None,
        library_name=kind.library,
        license=base_licence(checkpoint.path),
        pipeline_tag="text-generation",
        tags=["steer2edit", "activation-steering", *kind.tags],
    )
    behaviour = receipt["data"].get("name", "a steering vector")
    total = sum(change["norm"] ** 2 for change in receipt["changed"]) ** 0.5
    measured = receipt["measured"]
    rows = [
        ("Base", f"{base['name']}" + (f" at `{base['revision']}`" if base["revision"] else "")),
        ("Base fingerprint", f"`{base['fingerprint']}`"),
        ("Behaviour", behaviour),
        (
            "Method",
            ", ".join(f"{key} = {value}" for key, value in receipt["method"].items() if value is not None),
        ),
        ("Changed tensors", f"{len(receipt['changed'])}, ‖ΔW‖ = {total:.4g} in all"),
        ("Exactness", receipt["exactness"]),
        ("Plan", f"`{receipt['plan']['sha256']}`"),
    ]
    if "kl" in measured:
        rows.append(
            (
                "KL from the base on neutral text",
                f"{measured['kl']:.4f} nats a token over {measured['tokens']} tokens",
            )
        )
        rows.append(
            (
                "Perplexity on neutral text",
                f"{measured['base_perplexity']:.3f} before, {measured['perplexity']:.3f} after",
            )
        )
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {_cell(base['name'])}, edited: {_cell(behaviour)}\n\n"
        f"{kind.said}\n\n{_loading(target, base['name'])}\n\n| | |\n|---|---|\n{table}\n\n"
        "`steer2edit.json` lists every changed tensor; `steer2edit/plan.safetensors` is the plan that reproduces this "
        "artefact from the base (`steer2edit show`, `steer2edit verify`).\n"
    )


def base_licence(folder: Path) -> str | None:
    """The licence in the base's own card, if it has one."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError):
        return None
    licence = metadata.get("license")
    return licence if isinstance(licence, str) else None


def _loading(target: str, base: str) -> str:
    if target == "checkpoint":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```'
        )
    if target == "lora":
        return (
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{_cell(base)}")\n'
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n```'
        )
    option = "--lora adapter.gguf" if target == "gguf" else "--control-vector control-vector.gguf"
    return f"```\nllama-server -m base.gguf {option}\n```\n\nwhere `base.gguf` is any GGUF of {_cell(base)}."


def _cell(value: object) -> str:
    # names come from folders and data files: they may not break out of the table or the heading
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("```", "'''")
