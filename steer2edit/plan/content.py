"""What the matrices that a plan edits hold: a SHA-256 of each, which tells revisions apart that share a fingerprint.

A checkpoint's fingerprint reads 128 bytes of each tensor. A digest here reads all bytes of an edited matrix, and of its scales
where it is in fp8: about 1.4 GB/s for each processor, and only once while a checkpoint is open.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, scale_info


def content_of(checkpoint: Checkpoint, spec: ModelSpec, matrices: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the stored bytes of each matrix or bias, by the name that plans give it.

    Names that the model does not have are left out, as are biases to create, which hold nothing yet.
    """
    sites = {name: spec.owners[name] for name in matrices if name in spec.owners}
    places = {name: site.locate(checkpoint, name) for name, site in sites.items() if name != site.new_bias}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(places, pool.map(lambda info: _digest(checkpoint, info), places.values()), strict=True))


def _digest(checkpoint: Checkpoint, info: TensorInfo) -> str:
    if info.name in checkpoint.digests:
        return checkpoint.digests[info.name]
    digest = hashlib.sha256()
    for one in (info, scale_info(checkpoint, info)) if info.dtype == FP8 else (info,):
        for block in checkpoint.raw_blocks(one):
            digest.update(block)
    checkpoint.digests[info.name] = digest.hexdigest()
    return checkpoint.digests[info.name]
