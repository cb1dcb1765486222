"""How likely a model finds given responses: log-probabilities of their tokens, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer2edit.encoding import Encoded
from steer2edit.model import LoadedModel, batches, pad_right
from steer2edit.progress import Progress, silent

_CHUNK = 256


def response_log_probabilities(
    loaded: LoadedModel, examples: Sequence[Encoded], *, batch_tokens: int = 4096, progress: Progress = silent
) -> list[torch.Tensor]:
    """For each example the log-probabilities, in nats, of its response's tokens ``ids[start:]``; float64 ``[tokens]``.

    The unembedding runs on the positions that predict a response's tokens and on no others.
    """
    pad = loaded.tokenizer.pad_token_id or 0
    found: dict[int, torch.Tensor] = {}
    with progress("likelihood", total=len(examples)) as advance, torch.inference_mode():
        for chosen in batches([len(example.ids) for example in examples], batch_tokens):
            batch = [examples[i] for i in chosen]
            ids, mask = pad_right([example.ids for example in batch], pad, loaded.device)
            states = loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            hidden = torch.cat([row[e.start - 1 : len(e.ids) - 1] for row, e in zip(states, batch, strict=True)])
            gold = torch.cat([row[e.start : len(e.ids)] for row, e in zip(ids, batch, strict=True)])
            parts = zip(torch.split(hidden, _CHUNK), torch.split(gold, _CHUNK), strict=True)
            values = torch.cat([loaded.log_probabilities(h).gather(1, g[:, None])[:, 0] for h, g in parts])
            split = torch.split(values.double().cpu(), [len(e.ids) - e.start for e in batch])
            found.update(zip(chosen, split, strict=True))
            advance(len(chosen))
    return [found[index] for index in range(len(examples))]
