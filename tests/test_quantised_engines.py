"""Quantised models in the libraries that run their formats: the numbers are those that are read, and adapters act."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, save_tiny
from quantised_models import AWQ, GPTQ, awq, compressed, gptq, quantised_copy, symmetric

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import CheckpointError
from steer2edit.plan import Base, EditPlan, LowRank

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 but for one module": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "llm_int8_skip_modules": ["lm_head", "down_proj"],
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes_from_capture_to_verified_adapter(tmp_path: Path, kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from conftest import save_chat_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from steer2edit.runtime.model import Runtime, load_model

    plain = save_chat_model(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**BITSANDBYTES[kind]), device_map={"": "cpu"}
    )
    shutil.copytree(plain, tmp_path / "q")
    (tmp_path / "q" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "q")

    checkpoint = open_checkpoint(tmp_path / "q")
    spec = read_spec(checkpoint)
    packed = [name for name, info in checkpoint.tensors.items() if info.packed is not None]
    assert len(packed) == (12 if "but" in kind else 14)
    loaded = load_model(checkpoint, spec, Runtime(dtype="float32"))
    for site in spec.sites:
        W, module = checkpoint.read(site.tensor).float(), loaded.module(site)
        if site.tensor in packed and kind != "int8":
            own = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(own.float(), W)
        assert torch.allclose(module(torch.eye(W.shape[1])).T.float(), W, atol=4e-3 * float(W.abs().max()))

    rows = [
        {"prompt": f"Question {i} ?", "positive": f"Yes, {i}.", "negative": f"Well, let us see what {i} is, in detail."}
        for i in range(12)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "n.txt").write_text("one two three four five six seven eight nine ten. " * 40)
    out = tmp_path / "out"
    result = run(
        *(
            "compile",
            tmp_path / "q",
            "--data",
            tmp_path / "d.jsonl",
            "--to",
            "lora",
            "--out",
            out,
            "--no-report",
            "--json",
        ),
        *("--weights", plain, "--all-components", "--neutral", tmp_path / "n.txt", "--kl-budget", 0.05),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["quantised"]["weights"]["name"] == "plain" and told["quantised"]["format"].startswith("bitsandbytes")
    found = verify(out, tmp_path / "q")
    assert found.ok, found.problems
    # the adapter moves the quantised model as the plan's hooks do, and is not passed over
    assert found.numbers["effect"] > 20 * found.numbers["difference"]


def test_a_kernel_that_reads_other_numbers_is_refused(tmp_path: Path) -> None:
    from conftest import llama_config
    from quantised_models import four_bits

    from steer2edit.runtime.dequantised import check_kernels

    plain = save_tiny(tmp_path / "plain", llama_config(num_hidden_layers=1))
    for divisor, wrong in ((2, False), (0.5, True)):
        folder = tmp_path / f"q{divisor}"

        def packed(W: torch.Tensor, divisor: float = divisor) -> Any:
            return four_bits(*W.shape, "nf4", twice=False, dtype="float32", block=int(W.shape[1] // divisor))

        quantised_copy(plain, folder, {"load_in_4bit": True}, packed)
        checkpoint = open_checkpoint(folder)
        check_kernels(checkpoint, torch.device("cuda"))
        if wrong:
            with pytest.raises(CheckpointError, match=r"bitsandbytes .* reads such matrices wrongly"):
                check_kernels(checkpoint, torch.device("cpu"))
        else:
            check_kernels(checkpoint, torch.device("cpu"))


SERVED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "gptq": ("gptqmodel", {**GPTQ, "backend": "torch"}, gptq),
    "gptq, inputs sorted": (
        "gptqmodel",
        {**GPTQ, "desc_act": True, "backend": "torch"},
        lambda W: gptq(W, order=torch.arange(W.shape[1]).flip(0)),
    ),
    "awq": ("gptqmodel", {**AWQ, "backend": "torch_awq"}, awq),
    "compressed-tensors": ("compressed_tensors", compressed(symmetric=True), symmetric),
}


# gptqmodel leaves a temporary folder open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", SERVED)
def test_adapters_act_in_the_libraries_that_run_the_formats(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    library, config, pack = SERVED[kind]
    pytest.importorskip(library)
    from steer2edit.runtime.model import load_model

    quantised_copy(tiny_llama, tmp_path / "q", config, pack)
    checkpoint = open_checkpoint(tmp_path / "q")
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec)
    for site in (*spec.sites, *spec.readers):
        W = checkpoint.read(site.tensor).float()
        # the library computes with scales in float16
        assert torch.allclose(loaded.module(site)(torch.eye(W.shape[1])).T.float(), W, atol=1e-3 * float(W.abs().max()))
    torch.manual_seed(0)
    edits = (LowRank(s.matrix, torch.randn(s.out_features, 2), torch.randn(2, s.in_features)) for s in spec.sites)
    emit(EditPlan(Base.of(checkpoint), tuple(edits)), checkpoint, spec, "lora", tmp_path / "out")
    found = verify(tmp_path / "out", tmp_path / "q")
    assert found.ok and found.numbers["effect"] > 0.1
