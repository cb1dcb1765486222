"""PEFT's cells: an adapter loaded, merged, unmerged, swapped for another and back, and two composed with weights.

python benchmarks/engines/run_peft.py WORK [CASE …]
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from prepare import answers
from records import Record, arguments, cases, cell, compare, keep, reference

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.runtime.model import LoadedModel, Runtime, load_model


def main(work: Path, chosen: list[str]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for case in cases(work):
        if chosen and case["key"] not in chosen:
            continue
        expected = reference(work, case["key"])
        columns = {
            "load": (_load, "first"),
            "merge": (_merge, "first"),
            "unmerge": (_unmerge, "base"),
            "hot-swap": (_swap, "second"),
            "back again": (_back, "first"),
            "composed": (_compose, "both"),
            "composed adapter": (_composed, "both"),
        }
        if "experts" in expected:
            columns["experts"] = (_with_experts, "experts")
        cells = {name: cell(partial(_compared, case, run, expected[key])) for name, (run, key) in columns.items()}
        if "experts" in expected:
            cells["experts, against base"] = cell(partial(_experts_alone, case))
        keep(work, "peft", case["key"], cells, {"peft": peft.__version__, "transformers": transformers.__version__})
        print(case["name"], {name: one.get("largest", one.get("error")) for name, one in cells.items()}, flush=True)


def _compared(case: dict[str, Any], run: Any, expected: list[Record]) -> dict[str, Any]:
    return compare(_run(case, run), expected)


def _run(case: dict[str, Any], run: Any) -> list[Record]:
    checkpoint = open_checkpoint(case["base"])
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime("cpu", "float32"))
    with torch.inference_mode():
        model = run(loaded, case)
    # PEFT's outer forward does not name its cache; the model inside has the adapter's layers too
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    held = LoadedModel(inner, loaded.tokenizer, loaded.spec)
    return answers(held, case["prompts"], case["tokens"])


def _adapted(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    return peft.PeftModel.from_pretrained(loaded.model, case["artefacts"]["first lora"], adapter_name="first").eval()


def _both(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    model = _adapted(loaded, case)
    model.load_adapter(case["artefacts"]["second lora"], adapter_name="second")
    return model.eval()


def _load(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    return _adapted(loaded, case)


def _merge(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    return _adapted(loaded, case).merge_and_unload()


def _unmerge(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    model = _adapted(loaded, case)
    model.merge_adapter()
    model.unmerge_adapter()
    return model.unload()


def _swap(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    model = _both(loaded, case)
    model.set_adapter("second")
    return model


def _back(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    model = _swap(loaded, case)
    model.set_adapter("first")
    return model


def _compose(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    model = _both(loaded, case)
    model.add_weighted_adapter(["first", "second"], list(case["weights"]), "both", combination_type="cat")
    model.set_adapter("both")
    return model


def _composed(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    return peft.PeftModel.from_pretrained(loaded.model, case["artefacts"]["both lora"]).eval()


def _with_experts(loaded: LoadedModel, case: dict[str, Any]) -> Any:
    return peft.PeftModel.from_pretrained(loaded.model, case["artefacts"]["experts lora"]).eval()


def _experts_alone(case: dict[str, Any]) -> dict[str, Any]:
    """An adapter with experts beside the same one whose experts' factors are zero: 0 where PEFT passes over them."""

    def without(loaded: LoadedModel, case: dict[str, Any]) -> Any:
        model = _with_experts(loaded, case)
        for name, parameter in model.named_parameters():
            if ".experts.lora_B" in name:
                parameter.zero_()
        return model

    return compare(_run(case, _with_experts), _run(case, without))


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    main(given.work, given.cases)
