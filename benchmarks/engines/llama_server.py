"""llama.cpp's server on loopback, in float32 and with one thread, with adapters that each request may choose.

    venv-llamacpp/bin/python benchmarks/engines/llama_server.py MODEL.gguf [--lora ADAPTER.gguf …] [--port 8131]

It ends with Ctrl-C.
"""

from __future__ import annotations

import argparse
import threading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lora", action="append", default=[], metavar="ADAPTER.gguf")
    parser.add_argument("--port", type=int, default=8131)
    given = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.n_ctx, params.n_parallel, params.port, params.use_jinja = 4096, 4, given.port, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers, params.warmup, params.cache_prompt, params.verbosity = 0, False, False, -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in given.lora]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
