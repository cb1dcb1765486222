"""Measurements of llm-abliteration's ``measure.py`` (github.com/jim-plus/llm-abliteration): refusal directions by hidden state.

The file is ``{"layers": n, "harmful_N": mean, "harmless_N": mean, "refuse_N": direction}``, N being the index into transformers'
``hidden_states``: the stream before block N, which is what block N - 1 writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from steer2edit.capture.vectors import Vectors
from steer2edit.importers.per_layer import at_layers
from steer2edit.importers.source import Importer, Reading, Source

_DIRECTION = re.compile(r"refuse_[0-9]{1,6}")


def _is_measurement(source: Source) -> bool:
    if source.format != "torch" or not isinstance(source.content, Mapping):
        return False
    names = [name for name in source.content if isinstance(name, str) and _DIRECTION.fullmatch(name)]
    return bool(names) and all(name.replace("refuse", "harmful") in source.content for name in names)


def _read(source: Source, reading: Reading) -> Vectors:
    directions = {
        name: value for name, value in source.content.items() if isinstance(name, str) and _DIRECTION.fullmatch(name)
    }
    numbered = Reading(layers=reading.layers, offset=reading.offset or -1)
    return at_layers(directions, source.described("llm-abliteration measurement"), numbered)


IMPORTERS = (Importer("llm-abliteration's measurements", _is_measurement, _read),)
