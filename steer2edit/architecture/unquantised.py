"""The unquantised form of a quantised model, as a plan reads it."""

from __future__ import annotations

from pathlib import Path

from steer2edit.architecture.read_spec import read_spec
from steer2edit.architecture.sites import ModelSpec
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.checkpoint.other_matrices import with_matrices_of
from steer2edit.errors import CheckpointError


def planned_from(checkpoint: Checkpoint, spec: ModelSpec, weights: str | Path | None) -> Checkpoint:
    """The checkpoint that a plan reads: with the matrices of the model ``weights``, where one is named.

    Raises CheckpointError where ``checkpoint`` is not quantised, or ``weights`` is not its unquantised form. Every writer is
    compared.
    """
    if weights is None:
        return checkpoint
    if checkpoint.quantisation is None:
        raise CheckpointError(
            f"{checkpoint.name} is not quantised in a format that is dequantised: its own matrices are read, and --weights has "
            "no place"
        )
    other = open_checkpoint(weights)
    if other.quantisation is not None:
        raise CheckpointError(f"{other.name} (--weights) is quantised itself ({other.quantisation.text})")
    theirs = read_spec(other)
    if (theirs.model_type, theirs.layers, theirs.hidden_size) != (spec.model_type, spec.layers, spec.hidden_size):
        raise CheckpointError(
            f"{other.name} (--weights) is a {theirs.model_type} of {theirs.layers} layers and width {theirs.hidden_size}; "
            f"{checkpoint.name} a {spec.model_type} of {spec.layers} and width {spec.hidden_size}"
        )
    return with_matrices_of(checkpoint, other, [site.tensor for site in spec.sites])
