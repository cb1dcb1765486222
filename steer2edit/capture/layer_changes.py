"""How much each block changes the residual stream, token by token: which layers hardly do anything on a text.

A layer is void for a token where it changes the stream by less than a share of its length, ``‖h' - h‖ < threshold ‖h‖``. This is
the question of L2 adaptive computation, asked of whole blocks and answered for the text, before a layer is removed for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.data.tokens import windows
from steer2edit.errors import DataError
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel

TOKENS = 8192
"""Tokens that are read, at most."""
WINDOW = 256


@dataclass(frozen=True)
class LayerChange:
    """What one block does to the stream, as means over tokens.

    Of ``‖h' - h‖ / ‖h‖``, of ``‖h'‖ / ‖h‖``, and of the cosine of h and h'.

    ``void`` is the share of tokens that it changes by less than the threshold.
    """

    layer: int
    change: float
    growth: float
    cosine: float
    void: float


def layer_changes(
    loaded: LoadedModel, texts: Sequence[str], threshold: float, progress: Progress = silent
) -> tuple[list[LayerChange], int]:
    """Each block's change of the stream on ``texts``, and how many tokens were counted.

    The first token of each window of 256 tokens is left out: attention parks on it, and its stream is like no other's. Raises
    DataError where the texts have too few tokens.
    """
    read = [ids for ids in windows(loaded.tokenizer, texts, TOKENS, min(WINDOW, loaded.context)) if len(ids) > 1]
    if not read:
        raise DataError("the text has no tokens to read a layer's change from; give a longer one")
    sums = {layer: torch.zeros(4, dtype=torch.float64) for layer in range(loaded.spec.layers)}
    with _watched(loaded, sums, threshold), progress("read", total=sum(map(len, read))) as advance:
        for ids in read:
            batch = torch.tensor([list(ids)], device=loaded.device)
            with torch.inference_mode():
                loaded.body()(input_ids=batch, use_cache=False)
            advance(len(ids))
    count = sum(len(ids) - 1 for ids in read)
    return [LayerChange(layer, *(total / count).tolist()) for layer, total in sums.items()], count


@contextmanager
def _watched(loaded: LoadedModel, sums: Mapping[int, torch.Tensor], threshold: float) -> Iterator[None]:
    def watching(total: torch.Tensor) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"])[:, 1:].double().flatten(0, 1)
            after = (output[0] if isinstance(output, tuple) else output)[:, 1:].double().flatten(0, 1).to(before.device)
            length = before.norm(dim=-1).clamp(min=1e-12)
            change = (after - before).norm(dim=-1) / length
            growth = after.norm(dim=-1) / length
            cosine = torch.cosine_similarity(before, after, dim=-1)
            total.add_(
                torch.stack([change.sum(), growth.sum(), cosine.sum(), (change < threshold).double().sum()]).cpu()
            )

        return hook

    with ExitStack() as stack:
        for layer, total in sums.items():
            block = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.callback(block.register_forward_hook(watching(total), with_kwargs=True).remove)
        yield
