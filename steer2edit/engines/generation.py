"""What a model says: batched greedy generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer2edit.data.tokens import token_ids
from steer2edit.errors import DataError
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 256,
    add_special_tokens: bool = True,
    progress: Progress = silent,
) -> list[list[int]]:
    """Greedy continuations as token ids, without the end token, in the order of ``prompts``.

    ``prompts`` are rendered texts; with a chat template, which writes its own special tokens, ``add_special_tokens`` is
    False. Whatever hooks are on the model are in force. Prompt and answer together are no longer than the model's context.
    Raises DataError where a prompt alone is.
    """
    tokenizer = loaded.tokenizer
    rows = token_ids(tokenizer, prompts, add_special_tokens)
    loaded.check_tokens(rows)
    room = loaded.context - max(map(len, rows), default=0)
    if room < 1:
        raise DataError(
            f"a prompt takes {loaded.context - room} tokens and the model's context is {loaded.context}: shorten it"
        )
    if room < max_new_tokens:
        notice(f"answers have at most {room} tokens and not {max_new_tokens}: the model's context is {loaded.context}")
        max_new_tokens = room
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pad = loaded.padding
    ends = loaded.end_tokens
    found: dict[int, list[int]] = {}
    with progress("generate", total=len(rows)) as advance, torch.inference_mode():
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            width = max(len(rows[i]) for i in chosen)
            # on the left, so that every row's next token is at the same place
            ids = torch.tensor([[pad] * (width - len(rows[i])) + rows[i] for i in chosen])
            mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in chosen])
            out = loaded.model.generate(
                input_ids=ids.to(loaded.device),
                attention_mask=mask.to(loaded.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
            for index, row in zip(chosen, out[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in ends), len(row))
                found[index] = row[:end]
            advance(len(chosen))
    return [found[index] for index in range(len(rows))]
