"""How much of an update an fp8 matrix keeps: rounded as it is, and with the correction of ``steer2edit.checkpoint.fp8``.

    python benchmarks/fp8_rounding.py
    python benchmarks/fp8_rounding.py --rows 7168 --columns 2048        (an expert of DeepSeek-V3)

A random matrix is quantised in blocks of 128 x 128; rank-1 updates of several sizes, relative to it, are stored. ``kept`` is
the part of the update along itself, ``noise`` the norm of what else changed over that of the matrix; quantising the matrix
in the first place cost ``quantised``. Seconds are processor time of one matrix, correction included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate

from steer2edit.checkpoint import open_checkpoint
from steer2edit.lowering.requantise import requantised
from steer2edit.plan.operations import LowRank

SIZE = (128, 128)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s, each block's largest entry at 448."""
    rows, columns = weight.shape
    blocks = weight.view(rows // SIZE[0], SIZE[0], columns // SIZE[1], SIZE[1])
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    return (weight / spread(scales)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor) -> torch.Tensor:
    """Each entry's scale."""
    return scales.repeat_interleave(SIZE[0], 0).repeat_interleave(SIZE[1], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(0)
    wide = torch.randn(given.rows, given.columns) * 0.02
    q, s = quantised(wide)
    weight = q.float() * spread(s)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_file({"w": q, "w_scale_inv": s}, Path(folder) / "model.safetensors")
        settings = {"quant_method": "fp8", "weight_block_size": list(SIZE)}
        (Path(folder) / "config.json").write_text(json.dumps({"quantization_config": settings}))
        checkpoint = open_checkpoint(folder)
        for relative in (0.003, 0.01, 0.025, 0.05, 0.1, 0.3):
            B, A = torch.randn(given.rows, given.rank), torch.randn(given.rank, given.columns)
            edit = LowRank("w", B, A * (relative * weight.norm() / (B @ A).norm()))
            wanted = edit.dense()
            plain = ((weight + wanted) / spread(s)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * spread(
                s
            ) - weight
            start = time.process_time()
            new, same, rescaled = [], 0, 0
            for block in requantised(checkpoint, checkpoint.tensors["w"], edit, True):
                new.append(block.new)
                # a block's memory is used again for the next
                same += int((block.before.view(torch.uint8) == block.after.view(torch.uint8)).sum())
                assert block.scales is not None and block.old_scales is not None
                rescaled += int((block.scales != block.old_scales).sum())
            seconds = time.process_time() - start
            stored = torch.cat(new) - weight
            row: list[object] = [f"{relative:.1%}"]
            for update in (plain, stored):
                kept = float((update * wanted).sum() / wanted.square().sum())
                row += [f"{kept:.1%}", f"{float((update - kept * wanted).norm() / weight.norm()):.2%}"]
            rows.append([*row, f"{same / weight.numel():.0%}", f"{rescaled / s.numel():.0%}", f"{seconds:.2f}"])
    headers = ["update", "kept, plain", "noise, plain", "kept", "noise", "bytes that stay", "new scales", "seconds"]
    print(tabulate(rows, headers=headers, tablefmt="github"))
    print(f"quantised: {float((weight - wide).norm() / wide.norm()):.2%}")


if __name__ == "__main__":
    main()
