"""PEFT adapters on a loaded model, whose own weights are the same before and after.

Some adapters change the base when PEFT loads them. Initialisations such as PiSSA and OLoRA split the base's matrices, and the
trained factors fit what is left of them; others bring trained biases, embeddings or whole modules. PEFT gets copies of these
tensors (the memory of the modules that the adapter's file names), and the base's own are put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from steer2edit.checkpoint import read_json
from steer2edit.errors import CheckpointError, first_line, shown
from steer2edit.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from steer2edit.files.sandbox import limited
from steer2edit.notices import notice
from steer2edit.runtime.loading import LOADING_ERRORS, printing_to_stderr

# an adapter's config may hold regular expressions, which may run for ever
_SECONDS = 600
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
_PREFIX = "base_model.model."


@contextmanager
def adapted(model: Any, folder: Path) -> Iterator[Any]:
    """Within the block ``model`` is under a PEFT adapter; afterwards its modules and tensors are those of before.

    Raises CheckpointError with PEFT's own reason, and for adapters whose base cannot be made again.
    """
    parts = [(m, dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    tensors = [(tensor, tensor.data) for tensor in chain(model.parameters(), model.buffers())]
    try:
        for module in _changed_by(model, folder):
            for tensor in chain(module.parameters(), module.buffers()):
                tensor.data = tensor.data.clone()
        adapter = with_adapter(model, folder)
        if adapter.active_peft_config.is_prompt_learning:
            raise CheckpointError(
                f"{folder} adapts the prompt and not the model's weights; such adapters are not measured"
            )
        try:
            yield adapter
        finally:
            if hasattr(adapter, "unload"):
                adapter.unload()
    finally:
        model.__dict__.pop("peft_config", None)
        for module, modules, parameters, buffers in parts:
            module._modules, module._parameters, module._buffers = modules, parameters, buffers
        for tensor, data in tensors:
            tensor.data = data


@printing_to_stderr()
def with_adapter(model: Any, folder: Path) -> Any:
    """The model under a PEFT adapter, whose layers PEFT puts into the model itself; :func:`adapted` takes them out again.

    Raises CheckpointError with PEFT's own reason.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft reads a property that transformers 5 renamed; any other warning is worth seeing
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # where the base has no bias, the adapter's is added all the same; only merging is not possible
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed", category=UserWarning)
        # PEFT goes on with what it made up for them
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} holds no adapter in safetensors; adapters in pickles (*.bin) are not loaded"
            )
        config = read_json(folder / ADAPTER_CONFIG)
        _check_initialisation(config, folder)
        _check_size(config, folder, model)
        try:
            with limited(_SECONDS):
                return PeftModel.from_pretrained(model, str(folder)).eval()
        except (*LOADING_ERRORS, UserWarning) as error:
            raise CheckpointError(f"PEFT cannot load {folder}: {first_line(error)}") from None


def checksums(model: Any) -> dict[str, int]:
    """Each parameter's and buffer's bytes as a sum of 64-bit words: any one changed bit changes it.

    It takes one pass over the weights at the speed of memory. Tensors that are not at hand (offloaded) are left out.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: _checksum(tensor) for name, tensor in named if not tensor.is_meta}


def changed(model: Any, before: Mapping[str, int]) -> list[str]:
    """Names of the tensors whose checksums are not those of ``before``, and of those that came or went."""
    now = checksums(model)
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def _checksum(tensor: torch.Tensor) -> int:
    data = tensor.detach()
    data = data.to_local() if hasattr(data, "to_local") else data
    raw = data.contiguous().reshape(-1).view(torch.uint8)
    whole = len(raw) // 8 * 8
    if raw.storage_offset() % 8:
        raw = raw.clone()
    words = raw[:whole].view(torch.int64).sum()
    return int(words) * 31 + int(raw[whole:].sum())


def _check_initialisation(config: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError for initialisations of which PEFT cannot make the same base again."""
    kind = config.get("init_lora_weights")
    if not isinstance(kind, str) or kind in _KEEPS_THE_BASE:
        return
    if kind.startswith(("pissa_niter", "corda")):
        why = "a random decomposition" if kind.startswith("pissa") else "statistics of its training data"
        raise CheckpointError(
            f"{folder} was initialised by {shown(kind)}: its factors fit a base that was changed by {why}, which the adapter "
            "does not hold; ask for its converted form (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    notice(
        f"{folder} was initialised by {shown(kind)}: PEFT changes the base when it loads it, here on copies; engines that load "
        "the factors alone give another model"
    )


def _check_size(config: Mapping[str, Any], folder: Path, model: Any) -> None:
    """Raise CheckpointError where a few words of a config would make PEFT build far more than the adapter holds."""
    if config.get("layer_replication"):
        raise CheckpointError(
            f"{folder} repeats layers of the model (layer_replication): it makes another model of it, which is not measured"
        )
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    largest = max((max(weight.shape) for weight in model.parameters() if weight.ndim), default=0)
    if wide := [rank for rank in ranks if isinstance(rank, int) and rank > largest]:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} gives the rank {shown(wide[0])}; no matrix of the model has more than {largest} rows "
            "or columns"
        )


def _changed_by(model: Any, folder: Path) -> list[Any]:
    """The modules whose own tensors PEFT may change when it loads an adapter."""
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        return []
    config, names = read_json(folder / ADAPTER_CONFIG), _names(folder / ADAPTER_WEIGHTS)
    rewriting = config.get("init_lora_weights") not in _KEEPS_THE_BASE
    modules = dict(model.named_modules())
    touched: dict[str, Any] = {}
    for name in names:
        if rewriting or ".lora_" not in name:
            place = name.removeprefix(_PREFIX)
            while place and place not in modules:
                place = place.rpartition(".")[0]
            if place:
                touched[place] = modules[place]
    return list(touched.values())


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
