"""Command line options shared by several commands: their declarations, and what the library makes of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in reading order."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


model_options = options(
    click.option("--revision", help="Branch, tag or commit of a Hub model."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Of the running model; auto is float32 on a CPU and the stored dtype elsewhere.",
    ),
    click.option("--device-map", help="Passed to transformers, for models larger than one device (needs accelerate)."),
    click.option("--trust-remote-code", is_flag=True, help="Run the model's own Python code."),
)
data_options = options(
    click.option("--data", help="Contrast data: JSONL, JSON, CSV, Parquet, or a Hub dataset id."),
    click.option("--behavior", help="A built-in behaviour instead: concise, truthful, formal or cautious."),
    click.option("--system", help="A system message put before every prompt."),
    click.option(
        "--span",
        type=click.Choice(["matched", "response"]),
        default="matched",
        show_default=True,
        help="A pair's responses cut to the shorter's length, or whole.",
    ),
    click.option(
        "--batch-tokens",
        type=click.IntRange(16),
        default=4096,
        show_default=True,
        help="Tokens of one batch.",
    ),
)
method_options = options(
    click.option(
        "--method", default="steering", show_default=True, help="steering, component (Steer2Edit) or ablation."
    ),
    click.option(
        "--sites", type=click.Choice(["attn", "mlp", "both"]), help="steering: the writers that carry the vector."
    ),
    click.option("--carriers", type=float, help="steering: share of each site's input columns that carry it."),
    click.option("--rho-attn", type=float, help="component: the paper's rho for heads; 0 leaves attention alone."),
    click.option("--rho-mlp", type=float, help="component: the paper's rho for neurons; 0 leaves MLPs alone."),
    click.option("--alpha", type=float, help="component: the paper's alpha. ablation: the part removed (1 is all)."),
    click.option("--tau-attn", type=float, help="component: threshold on a head's |cos|, in place of rho and alpha."),
    click.option("--tau-mlp", type=float, help="component: threshold on a neuron's |cos|."),
    click.option("--slope", type=float, help="component: growth of lambda over the threshold, with --tau-…."),
    click.option("--top-heads", type=float, help="component: edit this many heads (below 1: this share of them)."),
    click.option("--top-neurons", type=float, help="component: edit this many neurons (below 1: this share)."),
    click.option("--scale", type=click.Choice(["relative", "absolute"]), help="component: what lambda is measured in."),
    click.option("--layers", help="First and last layer to edit, such as 4-20."),
    click.option("--direction-layer", type=int, help="ablation: take the direction after this layer's block."),
    click.option("--embedding", is_flag=True, default=None, help="ablation: the token embedding too (untied models)."),
)
_METHOD_OPTIONS = (
    *("sites", "carriers", "rho_attn", "rho_mlp", "alpha", "tau_attn", "tau_mlp", "slope"),
    *("top_heads", "top_neurons", "scale", "layers", "direction_layer", "embedding"),
)
strength_options = options(
    click.option("--strength", type=float, help="Multiplies the edit; without it the KL budget decides."),
    click.option("--kl-budget", type=float, help="Mean KL per token on neutral text, in nats.  [default: 0.05]"),
    click.option("--neutral", type=PATH, help="Your own neutral text, instead of the packaged one."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
force_option = click.option("--force", is_flag=True, help="Replace an artefact that is there already.")


def only_statistics(given: dict[str, Any]) -> bool:
    if given["data"] or given["behavior"]:
        raise click.UsageError("--stats stands in place of --data and --behavior; give one of the three")
    return True


def read_behavior(given: dict[str, Any]) -> Any:
    from steer2edit.compiler import Behavior

    if bool(given["data"]) == bool(given["behavior"]):
        raise click.UsageError("give exactly one of --data, --behavior and (where there is one) --stats")
    if given["data"]:
        return Behavior.from_data(given["data"], given["system"], given["span"])
    return Behavior.builtin(given["behavior"], given["system"], given["span"])


def read_method_options(given: dict[str, Any]) -> Any:
    from dataclasses import fields

    from steer2edit import methods

    options_class = methods.load(given["method"]).Options
    known = {field.name for field in fields(options_class)}
    chosen = {name: given[name] for name in _METHOD_OPTIONS if given[name] is not None}
    if strange := sorted(chosen.keys() - known):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        raise click.UsageError(f"the method {given['method']} has no option {flags}")
    if "layers" in chosen:
        chosen["layers"] = _layers(chosen["layers"])
    return options_class(**chosen)


def _layers(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise click.BadParameter(
            f"{text!r} is no range of layers; expected one such as 4-20 or 7", param_hint="--layers"
        )
    return int(first), int(last if dash else first)


def read_strength(given: dict[str, Any]) -> float | None:
    # the paper's lambda is absolute: asked for by that name, it is not rescaled unasked
    if given["scale"] == "absolute" and given["strength"] is None and given["kl_budget"] is None:
        return 1.0
    value: float | None = given["strength"]
    return value


def read_budget(given: dict[str, Any]) -> float:
    from steer2edit.compiler import KL_BUDGET

    return KL_BUDGET if given["kl_budget"] is None else float(given["kl_budget"])


def read_neutral(given: dict[str, Any]) -> str | None:
    if given["neutral"] is None:
        return None
    try:
        text: str = given["neutral"].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {given['neutral']}: {error}", param_hint="--neutral") from None
    return text


def read_runtime(given: dict[str, Any]) -> Any:
    from steer2edit.model import Runtime

    quieten_transformers()
    return Runtime(given["device"], given["dtype"], given["device_map"], given["trust_remote_code"])


def quieten_transformers() -> None:
    # it draws bars of its own while it loads; ours is enough
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
