"""Decoder rows of a sparse autoencoder that SAELens saved: each is a feature's direction in the residual stream."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from steer2edit.capture.vectors import Vectors
from steer2edit.errors import DataError, first_line
from steer2edit.importers.per_layer import at_layers
from steer2edit.importers.source import Importer, Reading

CONFIG = "cfg.json"
_STREAM = re.compile(r"blocks\.(\d+)\.hook_(resid_(?:pre|post)|attn_out|mlp_out)")


def read_sae(folder: Path, reading: Reading) -> Vectors:
    """The sum of the chosen features' decoder rows, at the place where the SAE reads. Raises DataError for other places."""
    try:
        from sae_lens import SAE
    except ImportError:
        raise DataError(f"{folder} is an SAE; reading it needs SAELens: pip install 'steer2edit[sae]'") from None
    if not reading.features:
        raise DataError(f"{folder} is an SAE: say with --feature which of its features to steer")
    try:
        sae: Any = SAE.load_from_disk(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"SAELens cannot load {folder}: {first_line(error)}") from None
    rows: torch.Tensor = sae.W_dec.detach().float()
    strange = [feature for feature in reading.features if not 0 <= feature < rows.shape[0]]
    if strange:
        raise DataError(f"{folder} has the features 0-{rows.shape[0] - 1}; {strange[0]} is not one of them")
    hook = str(sae.cfg.metadata.hook_name)
    if _STREAM.fullmatch(hook) is None:
        raise DataError(
            f"{folder} reads {hook}; only the stream before or after a block and writers' outputs can be steered"
        )
    source = {
        "format": "SAELens decoder rows",
        "name": f"{folder.resolve().name} {'+'.join(map(str, reading.features))}",
        "file": folder.resolve().name,
        "sha256": hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest(),
        "features": list(reading.features),
        "hook": hook,
        "model": sae.cfg.metadata.model_name,
    }
    vector = rows[list(reading.features)].sum(dim=0)
    return at_layers({hook: vector}, source, Reading(offset=reading.offset))


IMPORTERS = (
    Importer(
        "SAELens folders",
        lambda source: source.format == "folder" and (source.path / CONFIG).is_file(),
        lambda source, reading: read_sae(source.path, reading),
    ),
)
