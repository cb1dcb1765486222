"""A model's folder as GGUF files in llama.cpp's formats: its own converter, then its own quantiser.

    venv-llamacpp/bin/python benchmarks/engines/quantise_gguf.py --library libllama.so MODEL OUT Q4_K_M Q8_0

The converter is that of ``convert.py``. The quantiser is ``llama_model_quantize``, which ``llama-quantize`` calls too; a build of
llama.cpp with shared libraries has it in libllama. OUT gets ``bf16.gguf`` and one file for each format. No importance matrix is
used.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

from convert import convert

FORMATS = {"Q4_0": 2, "Q8_0": 7, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""``enum llama_ftype`` of llama.h."""


class _Parameters(ctypes.Structure):
    """The first fields of ``llama_model_quantize_params``; the others keep llama.cpp's defaults, whatever they are."""

    _fields_ = [("threads", ctypes.c_int32), ("ftype", ctypes.c_int), ("rest", ctypes.c_char * 504)]


def quantise(library: Path, source: Path, out: Path, name: str, threads: int) -> None:
    """Write ``source`` in a format. Raises RuntimeError with llama.cpp's code where it cannot."""
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_backend_init()
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.ftype = threads, FORMATS[name]
    code = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama.cpp could not write {source} as {name}: llama_model_quantize returned {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="the folder to write into")
    parser.add_argument("formats", nargs="+", choices=FORMATS)
    parser.add_argument("--library", type=Path, required=True, help="llama.cpp's libllama")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    source = options.out / "bf16.gguf"
    convert("own", str(options.model), "--outfile", str(source), "--outtype", "bf16")
    for name in options.formats:
        quantise(options.library, source, options.out / f"{name}.gguf", name, options.threads)


if __name__ == "__main__":
    main()
