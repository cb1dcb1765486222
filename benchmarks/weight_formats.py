"""Formats of 4 and 8 bits: what each makes of a model's weights, as the numbers that it stands for.

The integer formats round to nearest and store what GPTQ, AWQ and int8 kernels store. They calibrate nothing: GPTQ and AWQ choose
other integers on data, in the same storage. GGUF's are written by its own library, or by llama.cpp's own converter and quantiser.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GROUP = 128
Weights = Mapping[str, torch.Tensor]
Convert = Callable[[Any, Path, Path], Weights]
"""What makes float32 weights by parameter name of a model, its folder, and a folder to write into."""


def int4_symmetric(weight: torch.Tensor) -> torch.Tensor:
    """Integers from -8 to 7 times a float16 scale for each group of ``GROUP`` inputs.

    A row's last group may be smaller.
    """
    return _grouped(weight, _symmetric4)


def int4_asymmetric(weight: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to 15, less a whole zero point, times a float16 scale; groups as in :func:`int4_symmetric`."""
    return _grouped(weight, _asymmetric4)


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    """Integers from -127 to 127 times a float16 scale for each row (output)."""
    scale = _stored(weight.abs().amax(dim=1, keepdim=True) / 127)
    return (weight / scale).round().clamp(-127, 127) * scale


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """GGUF's Q8_0 by its library; as it is where rows are not whole blocks of 32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    if weight.shape[1] % 32:
        return weight
    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))


def of_linear(rounded: Callable[[torch.Tensor], torch.Tensor]) -> Convert:
    """A format of the linear layers; embedding and unembedding stay, as GPTQ and AWQ leave them."""

    def convert(model: Any, _folder: Path, _out: Path) -> Weights:
        head = model.get_output_embeddings()
        return {
            f"{name}.weight": rounded(module.weight.detach().float())
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }

    return convert


def of_matrices(rounded: Callable[[torch.Tensor], torch.Tensor]) -> Convert:
    """A format of every matrix, the embedding too, as GGUF files have it."""

    def convert(model: Any, _folder: Path, _out: Path) -> Weights:
        return {name: rounded(one.detach().float()) for name, one in model.named_parameters() if one.dim() == 2}

    return convert


@dataclass(frozen=True)
class LlamaCpp:
    """A format as llama.cpp writes it, by ``engines/quantise_gguf.py`` in an environment that has the converter."""

    name: str
    python: Path
    library: Path

    def __call__(self, model: Any, folder: Path, out: Path) -> Weights:
        """The weights, read by transformers' reader of GGUF. Raises RuntimeError where it reads the unquantised file wrongly."""
        script = Path(__file__).parent / "engines" / "quantise_gguf.py"
        command = [self.python, script, "--library", self.library, folder, out, self.name]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
        stored = dict(model.named_parameters())
        for name, read in _read(out, "bf16.gguf").items():
            if not torch.equal(read, stored[name].detach().float()):
                raise RuntimeError(f"transformers reads {name} from GGUF as other numbers than the checkpoint's")
        types = sorted(_types(out / f"{self.name}.gguf").items())
        print(f"{self.name} of {folder.name}:", ", ".join(f"{count} {kind}" for kind, count in types), file=sys.stderr)
        return _read(out, f"{self.name}.gguf")


def _read(folder: Path, file: str) -> Weights:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, local_files_only=True)
    return {name: one.detach() for name, one in model.named_parameters()}


def _types(path: Path) -> dict[str, int]:
    """How many matrices a GGUF file has of each type."""
    from gguf import GGUFReader

    kinds = [tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return {kind: kinds.count(kind) for kind in kinds}


def _grouped(weight: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat([rounded(part) for part in torch.split(weight, GROUP, dim=1)], dim=1)


def _symmetric4(group: torch.Tensor) -> torch.Tensor:
    scale = _stored(group.abs().amax(dim=1, keepdim=True) / 7.5)
    return (group / scale).round().clamp(-8, 7) * scale


def _asymmetric4(group: torch.Tensor) -> torch.Tensor:
    low, high = (group.amin(dim=1, keepdim=True).clamp(max=0), group.amax(dim=1, keepdim=True).clamp(min=0))
    scale = _stored((high - low) / 15)
    zero = (-low / scale).round().clamp(0, 15)
    return ((group / scale).round() + zero).clamp(0, 15).sub(zero) * scale


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """A scale in float16, never zero."""
    return scale.half().float().clamp(min=6e-8)
