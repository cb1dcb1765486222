"""One matrix of the residual stream: its width, what is wrong with it, and the token embedding."""

from __future__ import annotations

from steer2edit.architecture.coverage import around
from steer2edit.architecture.family import Family, Orientation
from steer2edit.architecture.sites import MatrixRole, Site
from steer2edit.checkpoint import EDITABLE, Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, scale_info
from steer2edit.errors import CheckpointError


def check_matrix(site: Site, checkpoint: Checkpoint, head_size: int) -> list[str]:
    """What is wrong with a writer's dtype and shape."""
    problems, info = [], site.locate(checkpoint)
    if info.dtype == FP8 and len(info.shape) == 2:
        try:
            scale_info(checkpoint, info)
        except CheckpointError as error:
            problems.append(str(error))
    elif info.dtype not in EDITABLE:
        problems.append(f"{info.name} is stored as {info.dtype}; editable are {', '.join(sorted(EDITABLE))}")
    if info.packed is not None and site.orientation != "out_in":
        problems.append(f"{info.name} is quantised, output × input; this family's matrices are input × output")
    axis = 0 if site.orientation == "out_in" else 1
    if len(info.shape) != 2 or 0 in info.shape or info.shape[axis] != site.out_features:
        problems.append(f"{info.name} has the shape {list(info.shape)}; expected {site.out_features} on axis {axis}")
    elif site.heads is not None and site.heads * head_size != site.in_features:
        problems.append(f"{info.name} has {site.in_features} input columns; expected {site.heads} heads of {head_size}")
    return problems


def embedding_site(
    checkpoint: Checkpoint, family: Family, prefix: str, module: str, hidden: int
) -> tuple[Site, list[str]]:
    """The token embedding, and what is wrong with it."""
    leaf = family.embedding.removeprefix(family.blocks.rsplit(".", 1)[0] + ".")
    blocks = family.blocks.rsplit(".", 1)[-1] + "."
    name = f"{around(prefix)}{family.disk_embedding or leaf}.weight"
    info, problems = checkpoint.tensors.get(name), []
    if info is None or len(info.shape) != 2 or info.shape[1] != hidden:
        shape = "is missing" if info is None else f"has the shape {list(info.shape)}"
        problems.append(f"{name} {shape}; expected the token embedding, [vocabulary, {hidden}]")
    rows = info.shape[0] if info is not None and info.shape else 0
    # a row per token: read as a matrix, it maps a one-hot token to the stream and is stored input × output
    return Site(MatrixRole.EMBED, 0, name, module.removesuffix(blocks) + leaf, "in_out", hidden, rows), problems


def in_features(info: TensorInfo, orientation: Orientation) -> int:
    """How many inputs a matrix has."""
    shape = info.shape or (0,)
    return shape[-1] if orientation == "out_in" else shape[0]
