"""Run a model that is larger than memory, one layer at a time.

All batches pass a layer before the next one is read.

The model's own forward runs for every layer and every batch, with the layers before it answering what they answered and
the pass ending after it: embeddings, masks, positions and whatever else a family hands to its layers are its own
code's affair. Each layer's weights are read once. Loading is transformers', its disk offload accelerate's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import ArchitectureError, CheckpointError, Steer2EditError
from steer2edit.runtime.model import LoadedModel, Runtime, empty_model, load_tokenizer, load_weights, pick_device
from steer2edit.runtime.number_format import resolved_dtype


class Layers:
    """A loaded model's blocks, whose weights are on disk, and what they gave for each batch."""

    def __init__(self, loaded: LoadedModel, shelf: Sequence[Sequence[tuple[Any, str, Any]]], scratch: Path) -> None:
        self.loaded = loaded
        self._shelf = shelf
        self._scratch = scratch
        self._answers: dict[int, Any] = {}
        self._shared: dict[int, dict[str, Any]] = {}
        self._running = -1
        self._batch = 0

    def __len__(self) -> int:
        return len(self._shelf)

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Within the block a layer's weights are in memory, and passes of the model end behind it."""
        from accelerate.utils import set_module_tensor_to_device

        device = self.loaded.device
        block = self.loaded.model.get_submodule(f"{self.loaded.spec.block_modules}{layer}")
        try:
            for module, name, weights in self._shelf[layer]:
                set_module_tensor_to_device(module, name, device, value=weights[name])
        except (OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"the weights of layer {layer} cannot be read: {error}") from None
        if left := [name for name, values in block.named_parameters() if values.is_meta]:
            raise ArchitectureError(f"layer {layer} shares {left[0]} with another; such a model does not run by layers")
        self._running = layer
        try:
            yield
        finally:
            self._running = -1
            for module, name, _ in self._shelf[layer]:
                set_module_tensor_to_device(module, name, "meta")

    def run(self, batch: int, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Pass a batch through the resident layer. Hooks on it and inside it see what they see in a whole pass."""
        self._batch = batch
        with suppress(_Passed), torch.inference_mode():
            self.loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
            raise ArchitectureError(
                f"{type(self.loaded.model).__name__} does not pass through its layer {self._running}: it does not run by layers"
            )

    @contextmanager
    def gated(self) -> Iterator[None]:
        """Within the block the model's layers are stood for by gates; to be entered once all hooks are in place."""
        model, path = self.loaded.model, self.loaded.spec.block_modules
        blocks = [model.get_submodule(f"{path}{layer}") for layer in range(len(self))]
        holder = model.get_submodule(path.removesuffix("."))
        for layer, block in enumerate(blocks):
            setattr(holder, str(layer), _Gate(self, layer, block))
        try:
            yield
        finally:
            for layer, block in enumerate(blocks):
                setattr(holder, str(layer), block)

    def answer(self, layer: int, block: Any, args: Any, kwargs: Any) -> Any:
        """What a gate gives back."""
        if layer < self._running:
            return _moved(self._answers[self._batch], self.loaded.device)
        # layers of Gemma 4 use the keys and values of an earlier one, which the model hands from layer to layer
        shared = kwargs.get("shared_kv_states")
        if shared is not None:
            shared.update(self._shared.get(self._batch, {}))
        answer = block(*args, **kwargs)
        if shared is not None:
            self._shared[self._batch] = dict(shared)
        self._answers[self._batch] = self._kept(answer)
        raise _Passed

    def _kept(self, answer: Any) -> Any:
        """A layer's answer, its first tensor in a file that the system may write out and drop from memory."""
        whole = answer if isinstance(answer, tuple) else (answer,)
        hidden, rest = whole[0], whole[1:]
        held = self._answers.get(self._batch)
        held = held[0] if isinstance(held, tuple) else held
        if held is None or held.shape != hidden.shape or held.dtype != hidden.dtype:
            file = self._scratch / f"{self._batch}.hidden"
            held = torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
        held.copy_(hidden)
        return (
            (held, *(part.cpu() if isinstance(part, torch.Tensor) else part for part in rest))
            if rest or isinstance(answer, tuple)
            else held
        )


def _moved(answer: Any, device: torch.device) -> Any:
    if isinstance(answer, tuple):
        return tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in answer)
    return answer.to(device)


class _Passed(BaseException):
    """Raised when a pass has come to the layer that is resident.

    Nothing in the model's own code may take it for an error.
    """


class _Gate(torch.nn.Module):
    """Stands in a layer's place, and looks like it: models ask their layers for their type, their window and such."""

    def __init__(self, layers: Layers, layer: int, block: torch.nn.Module) -> None:
        super().__init__()
        # past nn.Module's registration: the layer is not a part of the gate
        self.__dict__.update(_layers=layers, _layer=layer, _block=block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._layers.answer(self._layer, self._block, args, kwargs)


@contextmanager
def opened_by_layer(
    checkpoint: Checkpoint, spec: ModelSpec, runtime: Runtime, scratch: Path | None = None
) -> Iterator[Layers]:
    """The model of a checkpoint with everything but its blocks in memory.

    Hidden states go to a temporary folder in ``scratch``, and so do weights that transformers holds in another form than the
    file (the fused experts of most mixtures): as much disk as they take. Raises Steer2EditError without accelerate, and
    CheckpointError with transformers' reason.
    """
    try:
        from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
    except ImportError:
        raise Steer2EditError("--by-layer needs accelerate: pip install 'steer2edit[offload]'") from None
    if runtime.device_map is not None:
        raise Steer2EditError("--by-layer places the model itself; leave --device-map out")
    if checkpoint.quantisation is not None:
        raise Steer2EditError(
            f"{checkpoint.name} is quantised ({checkpoint.quantisation.text}): its matrices are loaded whole, and --by-layer has "
            "no weights to bring in. Run it without, or capture the unquantised model by layers"
        )
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="steer2edit-", dir=scratch))
    except OSError as error:
        raise Steer2EditError(f"cannot make a folder in {scratch}: {error.strerror or error}") from None
    try:
        device = pick_device(runtime.device)
        dtype = resolved_dtype(runtime.dtype, device, checkpoint.path)
        tokenizer = load_tokenizer(checkpoint.path, runtime.trust_remote_code)
        empty = empty_model(checkpoint.path, runtime.trust_remote_code)
        placing = _placing(empty, spec.block_modules, str(device))
        model = load_weights(
            checkpoint.path, replace(runtime, dtype=dtype, device_map=placing, offload_folder=str(folder / "weights"))
        )
        loaded = LoadedModel(model, tokenizer, spec, checkpoint.path)
        shelf = []
        for layer in range(spec.layers):
            block = model.get_submodule(f"{spec.block_modules}{layer}")
            hooks = ((module, getattr(module, "_hf_hook", None)) for module in block.modules())
            offloaded = [(m, h) for m, h in hooks if isinstance(h, AlignDevicesHook) and h.offload]
            shelf.append(
                [
                    (module, name, hook.weights_map)
                    for module, hook in offloaded
                    for name, values in module.named_parameters(recurse=False)
                    if values.is_meta
                ]
            )
        # their place is taken by `resident`: they would read a layer's weights for every batch
        remove_hook_from_submodules(model)
        yield Layers(loaded, shelf, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _placing(model: Any, block_modules: str, device: str) -> dict[str, Any]:
    """A device map of a model without weights.

    Blocks are on the disk, and so is the unembedding unless it is tied. The rest is on ``device``.

    accelerate wants every module named that is not inside a named one.
    """
    blocks = block_modules.removesuffix(".")
    head = model.get_output_embeddings()
    found: dict[str, Any] = {}

    def place(path: str, module: torch.nn.Module) -> None:
        inside = f"{path}." if path else ""
        if path == blocks:
            found.update({f"{inside}{layer}": "disk" for layer, _ in module.named_children()})
        elif f"{blocks}.".startswith(inside):
            for name, _ in module.named_parameters(recurse=False):
                found[f"{inside}{name}"] = device
            for name, child in module.named_children():
                place(f"{inside}{name}", child)
        else:
            idle = module is head and not model.config.get_text_config().tie_word_embeddings
            found[path] = "disk" if idle else device

    place("", model)
    return found
