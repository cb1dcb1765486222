"""Running a model through transformers: loading it, its parts, its batches.

This module and those above it are the only ones that import transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.wrappers import TEXT_ALONE
from steer2edit.checkpoint import Checkpoint, read_json
from steer2edit.checkpoint.fp8 import block_size
from steer2edit.checkpoint.quantised import READ, method_of
from steer2edit.data.templates import processor_template, templated
from steer2edit.data.tokens import token_ids
from steer2edit.errors import ArchitectureError, CheckpointError, first_line, shown
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.runtime.dequantised import (
    cast_dequantised,
    check_kernels,
    first_pass,
    keep_as_loaded,
    load_dequantised,
    runs_fp8,
)
from steer2edit.runtime.launch import process_of
from steer2edit.runtime.loading import LOADING_ERRORS, check_complete, check_release, printing_to_stderr, reason
from steer2edit.runtime.number_format import resolved_dtype
from steer2edit.runtime.replaced_body import returning

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""A folder with a tokenizer has at least one of these."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Runtime:
    """Where and how a model runs. ``auto`` is the best device, and the stored dtype.

    On a CPU ``auto`` is float32, but for models stored in bfloat16 where the processor has instructions for it.

    ``device_map`` and ``offload_folder`` are transformers' own. With ``tensor_parallel`` the processes that torchrun started
    hold parts of each matrix, as transformers' plan for the family says.
    """

    device: str = "auto"
    dtype: str = "auto"
    device_map: str | Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    offload_folder: str | None = None
    tensor_parallel: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer and the compiler's view of it.

    ``folder`` is where the weights lie, and ``adapter`` the adapter that is on them, for engines that load files.
    ``fingerprint`` is the checkpoint's, where the model was loaded from one and not changed since.
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    folder: Path | None = None
    adapter: Path | None = None
    fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return device_of(self.model.get_input_embeddings())

    @property
    def end_tokens(self) -> set[int]:
        """The tokens that end an answer. Raises CheckpointError where generation_config.json names something else than ids."""
        stored = self.model.generation_config.eos_token_id
        ends = stored if isinstance(stored, list) else [stored]
        if not all(end is None or (isinstance(end, int) and not isinstance(end, bool)) for end in ends):
            raise CheckpointError(
                f"eos_token_id of generation_config.json is {shown(stored)}; expected a token's id or a list of ids"
            )
        return {token for token in (*ends, self.tokenizer.eos_token_id) if token is not None}

    @property
    def context(self) -> int:
        """How many tokens the model can read at once; a large number where its config does not say."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return 1 << 20

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings of."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def padding(self) -> int:
        """The token to fill rows up with, where nothing is read: the tokenizer's, if the model knows it."""
        token = self.tokenizer.pad_token_id
        return token if isinstance(token, int) and 0 <= token < self.vocabulary else 0

    def check_tokens(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise CheckpointError where rows hold a token that the model has no embedding of."""
        vocabulary = self.vocabulary
        strange = sorted({token for row in rows for token in row if not 0 <= token < vocabulary})
        if strange:
            named = ", ".join(
                f"{token} ({shown(self.tokenizer.convert_ids_to_tokens(token))})" for token in strange[:5]
            )
            more = ", …" if len(strange) > 5 else ""
            raise CheckpointError(
                f"the tokenizer gives tokens without an embedding in the model: {named}{more}; the model has {vocabulary} and "
                f"the tokenizer {len(self.tokenizer)}. Take the tokenizer that belongs to the model"
            )

    def body(self) -> Any:
        """The model without its unembedding: ids → last hidden state."""
        base = self.model.base_model
        # some wrappers and Llama 4's causal model are their own base model; OPT's goes past its, to the decoder in it
        base = self._with_head.model if base is self.model else base
        return getattr(base, "decoder", base)

    @property
    def _with_head(self) -> Any:
        """The model that has the unembedding: in some wrappers the one inside."""
        inner = (getattr(self.model, name, None) for name in ("language_model", "text_model"))
        return next((one for one in inner if hasattr(one, "lm_head")), self.model)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, vocabulary]`` of final hidden states ``[n, hidden]``, in the model's dtype."""
        # the model's own forward with its body replaced: whatever the family does to logits is done here too
        body = self.body()
        with torch.inference_mode(), returning(body, hidden[None]):
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
            return logits

    def module(self, site: Site) -> Any:
        """The module that a site's matrix lives in. Raises ArchitectureError where transformers has no such module."""
        if site.role is MatrixRole.UNEMBED:
            return self._with_head.get_output_embeddings()
        try:
            return self.model.get_submodule(site.module)
        except AttributeError:
            raise ArchitectureError(
                f"transformers' {type(self.model).__name__} has no module {site.module} for {site.tensor}"
            ) from None


def load_model(checkpoint: Checkpoint, spec: ModelSpec, runtime: Runtime = Runtime()) -> LoadedModel:
    """Load a checkpoint's model and tokenizer for inference. Raises CheckpointError with transformers' own reason."""
    tokenizer = load_tokenizer(checkpoint.path, runtime.trust_remote_code)
    check_kernels(checkpoint, pick_device(runtime.device))
    model = load_weights(checkpoint.path, runtime)
    return LoadedModel(model, tokenizer, spec, checkpoint.path, fingerprint=checkpoint.fingerprint)


@printing_to_stderr()
def load_weights(path: Path, runtime: Runtime = Runtime()) -> Any:
    """The causal language model of a folder, in evaluation mode, on its device."""
    device = pick_device(runtime.device)
    dtype: Any = runtime.dtype if runtime.device_map is not None else resolved_dtype(runtime.dtype, device, path)
    if dtype != "auto":
        dtype = getattr(torch, dtype)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    check_release(path, config)
    if block_size(config) and not runs_fp8(device):
        if runtime.trust_remote_code or runtime.device_map:
            raise CheckpointError(
                f"{path} is in fp8, which this device does not run; it is loaded as plain numbers, and then neither with "
                "--trust-remote-code nor with --device-map"
            )
        return load_dequantised(path, dtype).to(device).eval().requires_grad_(False)
    placing: dict[str, Any] = {"device_map": runtime.device_map} if runtime.device_map else {}
    if not placing and method_of(config) in READ:
        # a quantised model does not move: it is loaded to where it runs
        placing = {"device_map": {"": str(device)}}
    if runtime.offload_folder is not None:
        placing["offload_folder"] = runtime.offload_folder
    if runtime.tensor_parallel:
        placing |= _tensor_parallel()
    settings = {"dtype": dtype, "trust_remote_code": runtime.trust_remote_code, "local_files_only": True, **placing}
    settings["use_safetensors"] = True  # never a pickle
    # shapes that differ are named by check_complete: transformers' own error refers to its log
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds {ADAPTER_CONFIG} beside a model: transformers would load that adapter's base in its place; take it out"
        )
    try:
        model, loading = _first_that_knows(config, lambda kind: kind.from_pretrained(path, **settings))
    except LOADING_ERRORS as error:
        raise CheckpointError(f"transformers cannot load {path}: {reason(error, config)}") from None
    check_complete(path, model, loading)
    if (config.get("quantization_config") or {}).get("quant_method") == "mxfp4" and dtype != "auto":
        cast_dequantised(model, dtype)
    keep_as_loaded(model)
    if not placing:
        model.to(device)
    if method_of(config) == "compressed-tensors":
        first_pass(model)
    return model.eval().requires_grad_(False)


@printing_to_stderr()
def empty_model(path: Path, trust_remote_code: bool = False) -> Any:
    """The model of a folder with its modules and no weights, all on the meta device. Raises CheckpointError."""
    from transformers import AutoConfig

    settings = {"trust_remote_code": trust_remote_code}
    given = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    check_release(path, given)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, **settings)
        with torch.device("meta"):
            return _first_that_knows(config.to_dict(), lambda kind: kind.from_config(config, **settings))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"transformers cannot make the model of {path}: {reason(error, given)}") from None


def _first_that_knows(config: Mapping[str, Any], make: Callable[[Any], Any]) -> Any:
    """What ``make`` gives for the first of transformers' automatic classes that knows the model's type."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    kinds = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    # a language model inside a multimodal one is loaded with the rest of it, as its users load it
    if (config.get("vision_config") or config.get("vq_config")) and config.get("model_type") not in TEXT_ALONE:
        kinds = [AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM]
    for kind in kinds[:-1]:
        try:
            return make(kind)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    return make(kinds[-1])


def _tensor_parallel() -> dict[str, Any]:
    """What tells transformers to divide a model by its own plan among the processes that were started.

    The number of processes is given, and the plan is left out: every release since 5.15 reads that in one way.
    """
    from transformers.distributed import DistributedConfig

    started = process_of(os.environ)
    return {"distributed_config": DistributedConfig(tp_size=started.size if started else 1)}


def device_of(module: Any) -> torch.device:
    """Where a module runs: where its weights are, or where accelerate brings them to for a pass."""
    # GPTQ's and AWQ's modules hold buffers alone
    device: torch.device = next(chain(module.parameters(), module.buffers())).device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    inner = next((h for h in getattr(hook, "hooks", [hook]) if getattr(h, "execution_device", None) is not None), None)
    return torch.device("cpu" if inner is None else inner.execution_device)


@printing_to_stderr()
def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, with the chat template of ``chat_template.json`` where it has none of its own."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"there is no tokenizer in {path} (none of {', '.join(TOKENIZER_FILES)}); copy the base's tokenizer files there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        token_ids(tokenizer, ["a"])  # some of what is wrong shows only when it is used
    except Exception as error:  # whatever a damaged file makes of it: tokenizers raises plain Exception
        raise CheckpointError(f"transformers cannot load the tokenizer of {path}: {first_line(error)}") from None
    if isinstance(tokenizer.eos_token_id, list):
        raise CheckpointError(
            f"the end token of the tokenizer in {path} is {shown(tokenizer.eos_token)}; expected one token, as a text"
        )
    if not templated(tokenizer):
        tokenizer.chat_template = processor_template(path)
    return tokenizer


def pick_device(name: str) -> torch.device:
    """The device called ``name``; for ``auto`` CUDA, else MPS, else the CPU."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError:
            raise CheckpointError(f"{name!r} is not a device; expected auto, cpu, cuda, cuda:N or mps") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
