"""The residual stream of single examples: the mean over each response's span, after every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steer2edit.data.tokens import Encoded
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import LoadedModel


def stream_means(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
    stage: str = "read the pairs",
) -> torch.Tensor:
    """Mean activation of each example, ``[examples, layers, hidden]`` float32 on the CPU.

    The span is that of a capture: the positions ``[start-1, end-1)``, which predict the response's tokens.
    """
    loaded.check_tokens(example.ids for example in examples)
    means = torch.zeros(len(examples), loaded.spec.layers, loaded.spec.hidden_size)
    with progress(stage, total=len(examples)) as advance, torch.inference_mode():
        for chosen in batches([len(example.ids) for example in examples], batch_tokens):
            ids, mask = pad_right([examples[i].ids for i in chosen], loaded.padding, loaded.device)
            spans = [(examples[i].start - 1, len(examples[i].ids) - 1) for i in chosen]
            with _reading(loaded, spans) as outputs:
                loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
            means[chosen] = torch.stack([outputs[layer] for layer in range(loaded.spec.layers)], dim=1)
            advance(len(chosen))
    return means


@contextmanager
def _reading(loaded: LoadedModel, spans: Sequence[tuple[int, int]]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, what each layer's output is on average over the spans of a batch, ``[rows, hidden]`` by layer."""
    outputs: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Any:
        def read(_module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            # OPT's blocks may run on [rows * positions, features]
            states = states.reshape(len(spans), -1, states.shape[-1])
            rows = [states[row, start:end].float().mean(0) for row, (start, end) in enumerate(spans)]
            outputs[layer] = torch.stack(rows).cpu()

        return read

    with ExitStack() as stack:
        for layer in range(loaded.spec.layers):
            module = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
            stack.callback(module.register_forward_hook(hook(layer)).remove)
        yield outputs
