"""vLLM's cells: the merged checkpoint, and adapters beside the base in one process.

Adapters are switched for each request, and mixed in a batch.

    venv-vllm/bin/python benchmarks/engines/run_vllm.py WORK CASE … [--slots 4] [--adapters-only]

``--slots`` is vLLM's ``max_loras``. With as many slots as adapters its CPU engine (0.32.0) gives requests for the base the
adapter in the last slot when they share a batch with an adapter's: one slot more than adapters keeps that slot empty.

Of a multimodal model, which is asked without pictures, the first adapter also runs under the other names that its tensors could
have (``LAYOUTS``): does vLLM apply it, refuse it, or load it and ignore it?

A model that stops the process takes those after it along: ``run.sh`` gives each a process. Small models may share one, which
saves their starts.
"""

from __future__ import annotations

import argparse
import gc
import shutil
from pathlib import Path
from typing import Any

from records import TOP, Record, cases, cell, compare, keep, reference

_PEFT = "base_model.model."
OURS = ("model.language_model.", "language_model.model.", "model.")
"""What may stand before ``layers`` in the names that ``--to lora`` writes."""
LAYOUTS = {"language_model.model": "language_model.model.", "model": "model."}
"""What stands before ``layers`` in an adapter's names, beside ``OURS``: a file's and vLLM's own name, and a plain model's."""


def main(work: Path, key: str, slots: int, adapters_only: bool) -> None:
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    case = next(case for case in cases(work) if case["key"] == key)
    expected = reference(work, key)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    artefacts = case["artefacts"]

    def merged() -> dict[str, Any]:
        engine = _engine(artefacts["first checkpoint"], case)
        found = compare(_ask(engine, case, [None] * len(case["prompts"])), expected["merged"])
        del engine
        gc.collect()
        return found

    cells = {} if adapters_only else {"merged": cell(merged)}
    try:
        engine = _engine(case["base"], case, enable_lora=True, max_lora_rank=8, max_loras=slots)
        requests = {
            label: LoRARequest(label, number, artefacts[f"{label} lora"])
            for number, label in enumerate(("first", "second", "both"), 1)
        }
        for label in ("base", "first", "second", "both"):
            chosen = [requests.get(label)] * len(case["prompts"])
            cells[label] = cell(lambda c=chosen, e=label: compare(_ask(engine, case, c), expected[e]))  # type: ignore[misc]
        # one batch in which every prompt goes to the base and to two adapters
        mixed = ["base", "first", "second"]

        def batch() -> dict[str, Any]:
            prompts = [prompt for prompt in case["prompts"] for _ in mixed]
            found = _ask(
                engine, {**case, "prompts": prompts}, [requests.get(m) for _ in case["prompts"] for m in mixed]
            )
            wanted = [expected[label][i] for i in range(len(case["prompts"])) for label in mixed]
            return compare(found, wanted)

        cells["mixed batch"] = cell(batch)
        for number, name in enumerate(LAYOUTS if case.get("multimodal") else (), 10):
            cells |= _under_other_names(engine, case, expected, name, number)
    except Exception as error:  # of whatever an engine cannot do with a model
        reason = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}
        cells |= dict.fromkeys(("base", "first", "second", "both", "mixed batch"), reason)
    keep(work, "vllm", key, cells, versions)
    print(case["name"], {name: one.get("largest", one.get("error")) for name, one in cells.items()}, flush=True)


def _under_other_names(engine: Any, case: dict[str, Any], expected: Any, name: str, number: int) -> dict[str, Any]:
    """Two cells: the first adapter, with its tensors renamed, against the edited model, and against the unedited one."""
    from safetensors.numpy import load_file, save_file
    from vllm.lora.request import LoRARequest

    source = Path(case["artefacts"]["first lora"])
    folder = source.with_name(f"{source.name}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    tensors = load_file(source / "adapter_model.safetensors")
    ours = [one for one in OURS if all(key.startswith(f"{_PEFT}{one}layers.") for key in tensors)]
    if not ours or ours[0] == LAYOUTS[name]:
        return {}
    renamed = {key.replace(_PEFT + ours[0], _PEFT + LAYOUTS[name], 1): value for key, value in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    request = LoRARequest(name, number, str(folder))

    def against(label: str) -> dict[str, Any]:
        return compare(_ask(engine, case, [request] * len(case["prompts"])), expected[label])

    return {f"as {name}": cell(lambda: against("first")), f"as {name}, against base": cell(lambda: against("base"))}


def _engine(folder: str, case: dict[str, Any], **adapters: Any) -> Any:
    import vllm

    if case.get("multimodal"):  # no picture is asked about, and none is made room for
        adapters |= {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}
    return vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=9,
        max_num_batched_tokens=512,
        skip_tokenizer_init=not case.get("multimodal"),
        max_logprobs=2 * TOP,
        **adapters,
    )


def _ask(engine: Any, case: dict[str, Any], requests: list[Any]) -> list[Record]:
    import vllm

    settings = vllm.SamplingParams(
        temperature=0.0, max_tokens=case["tokens"], logprobs=TOP, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    outputs = engine.generate(prompts, settings, lora_request=requests, use_tqdm=False)
    found = []
    for ids, output in zip(case["prompts"], outputs, strict=True):
        answer = output.outputs[0]
        top = [[[token, value.logprob] for token, value in step.items()] for step in answer.logprobs]
        found.append({"prompt": ids, "tokens": list(answer.token_ids), "top": top})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--adapters-only", action="store_true", help="leave the merged checkpoint out")
    given = parser.parse_args()
    for chosen in given.cases:
        main(given.work, chosen, given.slots, given.adapters_only)
        gc.collect()
