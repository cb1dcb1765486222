"""Whole numbers of a few bits, packed densely into 32-bit words, from the lowest bits up."""

from __future__ import annotations

import torch


def unpacked(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The unsigned numbers of ``bits`` bits in ``words`` (int32), along ``axis`` of two; int32.

    A number may begin in one word and end in the next. As many come as fit into the words.
    """
    words = words if axis == 1 else words.T
    count = words.shape[1] * 32 // bits
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    unsigned = words.long() & 0xFFFFFFFF
    values = unsigned[:, word] >> shift
    split = (shift + bits > 32).nonzero()[:, 0]
    if len(split):
        values[:, split] |= unsigned[:, word[split] + 1] << (32 - shift[split])
    values = (values & ((1 << bits) - 1)).int()
    return values if axis == 1 else values.T
