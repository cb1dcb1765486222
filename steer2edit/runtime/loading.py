"""What goes wrong while a model is loaded: errors of other libraries, and weights that are not there.

transformers puts random numbers where a checkpoint lacks a weight, and goes on; here that is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from steer2edit.architecture.config import text_config
from steer2edit.architecture.releases import RUNS_SINCE
from steer2edit.errors import CheckpointError, count_of, first_line, listing
from steer2edit.notices import notice

LOADING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NotImplementedError),
    *(OSError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError),
)
"""What transformers and PEFT raise for damaged files and for configs that they do not know."""
_MOST_NAMES = 200
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|(attn|attention|self_attn)\.bias)$"
    r"|\.([kqv]_scale|kv_scale|[kv]_proj\.output_scale)$"
)
"""What older releases and engines save and no weight depends on: tables of positions and masks, scales of a cache."""
_PARTS = re.compile(r"(^|\.)(mtp|mtp_\w+|v_head|vision\w*|visual\w*|audio\w*|multi_modal\w*)\.")
"""Parts that a language model's class may leave out: heads of further tokens, value heads, what sees and hears."""
_RELEASE = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")
_LAYER = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """Within the block whatever prints does so to stderr: stdout is for results, and libraries have banners."""
    with redirect_stdout(sys.stderr):
        yield


def check_complete(path: Path, model: Any, loading: Mapping[str, Any]) -> None:
    """Raise CheckpointError with the names where a model's weights were not all loaded, or others lie in its checkpoint.

    ``loading`` is what transformers tells of it with ``output_loading_info``. A notice names parts that are known to be left out.
    """
    missing = sorted(loading.get("missing_keys") or ())
    unexpected = sorted(name for name in loading.get("unexpected_keys") or () if not _BUFFERS.search(name))
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    left_out = [name for name in unexpected if _PARTS.search(name) or _is_past(name, layers)]
    unknown = [name for name in unexpected if name not in set(left_out)]
    kind = type(model).__name__
    # newer releases give the shapes too: (name, shape in the file, shape in the model)
    mismatched = sorted({one if isinstance(one, tuple) else (one,) for one in loading.get("mismatched_keys") or ()})
    if mismatched:
        raise CheckpointError(
            f"{path} holds weights whose shapes differ from those that its config.json gives transformers' {kind}:\n"
            + _names(
                one[0] + (f": {list(one[1])} in the file, {list(one[2])} by the config" if len(one) == 3 else "")
                for one in mismatched
            )
        )
    if missing:
        others = f"\nIt holds others that {kind} has no place for:\n{_names(unknown)}" if unknown else ""
        raise CheckpointError(
            f"{path} lacks weights that transformers' {kind} needs, and that would be random numbers:\n{_names(missing)}{others}"
        )
    if unknown:
        raise CheckpointError(
            f"{path} holds weights that transformers' {kind} has no place for, and that would be ignored:\n{_names(unknown)}\n"
            "Convert the checkpoint to transformers' names, or take these tensors out of it"
        )
    if left_out:
        notice(
            f"transformers' {kind} does not run {count_of(len(left_out), 'tensor')} of {path}, such as {left_out[0]}"
        )


def check_release(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the installed transformers holds a model type in modules that are not those described."""
    import transformers

    for kind in {str(config.get("model_type")), text_config(config).model_type} & RUNS_SINCE.keys():
        if _numbers(transformers.__version__) < _numbers(RUNS_SINCE[kind]):
            raise CheckpointError(
                f"{path} is of the model type {kind!r}, whose modules are others in the installed transformers "
                f"{transformers.__version__}; edits find them from {RUNS_SINCE[kind]} on: "
                f"pip install -U 'transformers>={RUNS_SINCE[kind]}'"
            )


def reason(error: Exception, config: Mapping[str, Any]) -> str:
    """Why a model was not loaded, in a line."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
    if isinstance(error, KeyError) and kind is not None and error.args == (kind,):
        return f"it does not know the rope type {kind!r} of config.json"
    if unknown := _unknown_type(config):
        return unknown
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else first_line(error)


def _unknown_type(config: Mapping[str, Any]) -> str:
    """That the installed transformers does not know the config's model type, and what to install; empty where it does."""
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in transformers.CONFIG_MAPPING:
        return ""
    told = f"the installed transformers {transformers.__version__} does not know the model type {kind!r}"
    if config.get("auto_map"):
        return f"{told}; the code that comes with the model does (auto_map in config.json), and --trust-remote-code runs it"
    written = _RELEASE.match(str(config.get("transformers_version")))
    if written is None or not _numbers(transformers.__version__):
        return f"{told}; a newer release may: pip install -U transformers"
    if _numbers(written[0]) <= _numbers(transformers.__version__):
        return f"{told}, though config.json was written by {written[0]}: the model's page should say which code runs it"
    return f"{told}; config.json was written by {written[0]}: pip install -U 'transformers>={written[0]}'"


def _numbers(release: str) -> list[int]:
    """The three numbers of a release; empty where it is not one."""
    match = _RELEASE.match(release)
    return [] if match is None else [int(part or 0) for part in match.groups()]


def _is_past(name: str, layers: int | None) -> bool:
    """Whether a tensor is of a layer after the model's last, as heads that predict further tokens are stored."""
    layer = _LAYER.search(f".{name}")
    return layer is not None and layers is not None and int(layer[1]) >= layers


def _names(names: Iterable[str]) -> str:
    return listing(names, _MOST_NAMES)
