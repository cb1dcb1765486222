"""llama.cpp under a control vector, through its C interface: xllamacpp exports it, and its server does not offer this option.

Parameters that this file does not set are passed on as the library's own defaults fill them in; the few that it sets are found by
their place in ``llama.h``, and left alone where their defaults are not what that place should hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from records import TOP, Record

_F16, _F32 = 1, 0
_FIELDS: tuple[tuple[str, Any], ...] = (
    *((f"count{i}", ctypes.c_uint32) for i in range(7)),
    *((f"threads{i}", ctypes.c_int32) for i in range(2)),
    *((f"kind{i}", ctypes.c_int32) for i in range(4)),
    ("flash_attention", ctypes.c_int32),
    *((f"scale{i}", ctypes.c_uint32) for i in range(8)),
    *((f"callback{i}", ctypes.c_void_p) for i in range(2)),
    ("type_k", ctypes.c_int32),
    ("type_v", ctypes.c_int32),
    ("rest", ctypes.c_byte * 512),
)


class _Context(ctypes.Structure):
    _fields_ = list(_FIELDS)


class _Model(ctypes.Structure):
    _fields_ = [("rest", ctypes.c_byte * 512)]


class _Batch(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_int32), ("arrays", ctypes.c_void_p * 6)]


def follow(model: Path, vectors: dict[int, numpy.ndarray], records: Sequence[Record]) -> list[Record]:
    """What llama.cpp gives at every step of other answers, under vectors ``[hidden]`` by layer."""
    library = _library()
    loaded = library.llama_model_load_from_file(str(model).encode(), library.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"llama.cpp did not load {model}")
    width, layers = library.llama_model_n_embd(loaded), library.llama_model_n_layer(loaded)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(loaded))
    data = numpy.zeros((layers - 1, width), dtype=numpy.float32)
    for layer, vector in vectors.items():
        data[layer - 1] = vector
    found = []
    for record in records:
        settings = library.llama_context_default_params()
        settings.count0 = 512
        if (settings.type_k, settings.type_v) == (_F16, _F16):
            settings.type_k, settings.type_v, settings.flash_attention = _F32, _F32, 0
            settings.threads0 = settings.threads1 = 1
        context = library.llama_init_from_model(loaded, settings)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if library.llama_set_adapter_cvec(context, pointer, data.size, width, 1, layers - 1):
            raise RuntimeError("llama.cpp did not take the control vector")
        step, top, chosen = list(record["prompt"]), [], []
        for token in record["tokens"]:
            array = (ctypes.c_int32 * len(step))(*step)
            if library.llama_decode(context, library.llama_batch_get_one(array, len(step))):
                raise RuntimeError("llama.cpp did not decode")
            logits = numpy.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (size,)).astype(numpy.float64)
            logs = logits - logits.max() - numpy.log(numpy.exp(logits - logits.max()).sum())
            best = numpy.argsort(-logs)[:TOP]
            top.append([[int(i), float(logs[i])] for i in best])
            chosen.append(int(best[0]))
            step = [token]
        library.llama_free(context)
        found.append({"prompt": record["prompt"], "tokens": chosen, "top": top})
    library.llama_model_free(loaded)
    return found


def _library() -> ctypes.CDLL:
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Model, []),
        ("llama_context_default_params", _Context, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Model]),
        ("llama_init_from_model", pointer, [pointer, _Context]),
        ("llama_model_n_embd", number, [pointer]),
        ("llama_model_n_layer", number, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_set_adapter_cvec", number, [pointer, ctypes.POINTER(ctypes.c_float), ctypes.c_size_t, *[number] * 3]),
        ("llama_batch_get_one", _Batch, [pointer, number]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
