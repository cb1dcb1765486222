"""The repetition penalty (CTRL, Keskar et al. 2019): what a model names, and how it acts on logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from steer2edit.errors import CheckpointError, shown
from steer2edit.runtime.model import LoadedModel


def own_penalty(loaded: LoadedModel) -> float:
    """The repetition penalty of the model's generation_config.json, 1 for none.

    Raises CheckpointError for another value than a number.
    """
    return stored_penalty(getattr(loaded.model.generation_config, "repetition_penalty", None))


def stored_penalty(value: object) -> float:
    """What a generation_config.json holds as its repetition penalty, 1 for nothing.

    Raises CheckpointError for another value than a number.
    """
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(
            f"repetition_penalty of generation_config.json is {shown(value)}; expected a number above 0, such as 1.1"
        )
    return float(value)


def penalised(penalty: float, mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A processor of logits that weakens each row's tokens so far, and not what fills rows up.

    transformers' own one weakens that too. It may be the end token, and then an answer depends on its batch.
    """

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        read = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1).bool()
        # the last token is always read
        tokens = torch.where(read, ids, ids[:, -1:])
        values = logits.gather(1, tokens)
        weaker = torch.where(values < 0, values * penalty, values / penalty)
        return logits.scatter(1, tokens, weaker)

    return processor
