"""Quantised models where a device lacks a format's instructions, or a library's kernel is not faithful."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.checkpoint.bitsandbytes import FourBits
from steer2edit.checkpoint.fp8 import SUFFIX, read_values
from steer2edit.errors import CheckpointError, first_line
from steer2edit.notices import notice
from steer2edit.runtime.loading import check_complete


def check_kernels(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raise CheckpointError where a format's kernel for a device computes something else than its matrices stand for."""
    if device.type != "cpu":
        return
    four_bits = ((info.name, info.packed) for info in checkpoint.tensors.values() if isinstance(info.packed, FourBits))
    if odd := [(name, packed) for name, packed in four_bits if packed.shape[1] % packed.block]:
        name, packed = odd[0]
        raise CheckpointError(
            f"{name} has {packed.shape[1]} inputs, which are not whole blocks of {packed.block}: bitsandbytes 0.50 reads such "
            f"matrices wrongly on a CPU, {len(odd)} of this model's. Run it on a GPU"
        )


def keep_as_loaded(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit matrices anew for a CPU with bfloat16.

    Its kernel there rounds the scales to bfloat16, and where they are quantised too, rounds them once more whenever a state dict
    is asked for, as PEFT does: the base under an adapter would be another one than the base alone.
    """
    fast = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in fast:
        module.support_avx512bf16_for_cpu = False
    if fast:
        notice(
            "bitsandbytes' kernel for bfloat16 on CPUs is not used: it rounds the scales of 4-bit matrices again. It "
            "takes longer so"
        )


def first_pass(model: Any) -> None:
    """Run one token: compressed-tensors unpacks a model's matrices in the first pass of the whole, which a part's is not."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)


def cast_dequantised(model: Any, dtype: torch.dtype) -> None:
    """Give the weights that were dequantised the dtype asked for: transformers 5.15 leaves mxfp4's in bfloat16."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and parameter.device.type != "meta":
            parameter.data = parameter.data.to(dtype)


def runs_fp8(device: torch.device) -> bool:
    """Whether a device multiplies matrices in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def load_dequantised(path: Path, dtype: Any) -> Any:
    """A model in fp8 with block scales as the numbers that its weights stand for, for devices without fp8.

    transformers does so too, but with blocks of another size where a matrix is not a multiple of theirs, and leaves the dtypes
    mixed. Memory is that of the whole model in ``dtype``.
    """
    import transformers

    dtype = torch.bfloat16 if dtype == "auto" else dtype
    notice(
        f"{path} is in fp8, which this device does not run: it is loaded as {str(dtype).removeprefix('torch.')} numbers"
    )
    checkpoint = open_checkpoint(path)
    weights = {
        name: value.to(dtype) if (value := read_values(checkpoint, name)).is_floating_point() else value
        for name in checkpoint.tensors
        if not name.endswith(SUFFIX)
    }
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        del config.quantization_config
        kind = getattr(transformers, (config.architectures or [""])[0])
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise CheckpointError(f"transformers cannot load {path}: {first_line(error)}") from None
    check_complete(path, model, loading)
    return model
