"""Which tensors of a checkpoint write to the residual stream, and how: known for each model family."""

from steer2edit.architecture.read_spec import read_spec
from steer2edit.architecture.sites import MatrixRole, ModelSpec, Site

__all__ = ["MatrixRole", "ModelSpec", "Site", "read_spec"]
