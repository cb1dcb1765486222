"""Command line options shared by several commands: their declarations, and what the library makes of their values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from steer2edit.errors import printable
from steer2edit.files.untrusted import parse_json, read_bytes
from steer2edit.notices import notices

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
_TEXT_BYTES = 256 << 20


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
    click.option(
        "--device-map",
        help="Passed to transformers, for models larger than one device (needs accelerate): auto, or a JSON object of "
        "modules and devices.",
    ),
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
        "--background",
        "background_file",
        type=PATH,
        help="Your own text of all that the behaviour is not, instead of the packaged one.",
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
    click.option("--carriers", type=float, help="steering: share of each site's heads or neurons that carry it."),
    click.option(
        "--moments",
        type=click.Choice(["heads", "diagonal"]),
        help="steering: weigh a head's columns together, or each by itself.",
    ),
    click.option(
        "--background-weight",
        "background",
        type=float,
        help="steering: the background text's weight in the moments, 0 to 1.  [default: 0.5]",
    ),
    click.option(
        "--all-components",
        "stable",
        flag_value=False,
        type=bool,
        default=None,
        help="Edit components too whose score's sign is not stable.",
    ),
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
    *(
        "sites",
        "carriers",
        "moments",
        "background",
        "stable",
        "rho_attn",
        "rho_mlp",
        "alpha",
        "tau_attn",
        "tau_mlp",
        "slope",
    ),
    *("top_heads", "top_neurons", "scale", "layers", "direction_layer", "embedding"),
)
strength_options = options(
    click.option("--strength", type=float, help="Multiplies the edit; without it the KL budget decides."),
    click.option("--kl-budget", type=float, help="Mean KL per token on neutral text, in nats.  [default: 0.05]"),
    click.option("--kl-budget-attn", type=float, help="The same for attention's edits alone."),
    click.option("--kl-budget-mlp", type=float, help="The same for the MLPs' edits alone."),
    click.option("--neutral", type=PATH, help="Your own neutral text, instead of the packaged one."),
)
writing_options = options(
    click.option(
        "--jobs",
        type=click.IntRange(1),
        help="Pieces written at a time.  [default: as many as there are processors, at most 4]",
    ),
    click.option("--link", is_flag=True, help="Hard-link the shards that no edit touches instead of copying them."),
    click.option("--dry-run", is_flag=True, help="Say what would be read, changed and written, and stop there."),
)
vectors_option = click.option(
    "--vectors",
    "vectors_file",
    type=PATH,
    help="Steering vectors made elsewhere, as steer2edit import reads them, in place of the captured difference.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
force_option = click.option("--force", is_flag=True, help="Replace an artefact that is there already.")


def numbers(text: str, flag: str) -> list[float]:
    """Numbers separated by commas; none for an empty text."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers, such as 0.5,1,2", param_hint=flag) from None


def open_model(model: str, given: dict[str, Any]) -> Any:
    """A checkpoint and its specification."""
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, given["revision"])
    return checkpoint, read_spec(checkpoint)


def find_plan(where: str) -> Path:
    """A plan's file, or the plan inside an artefact's folder, here or on the Hub, from where nothing else is fetched."""
    from steer2edit.files.hub import fetch
    from steer2edit.files.layout import PLAN, PLAN_FILE

    found = fetch(where, only=[PLAN, PLAN_FILE])
    if not found.is_dir():
        return found
    return next((found / name for name in (PLAN, PLAN_FILE) if (found / name).is_file()), found / PLAN)


def progress_bar() -> Any:
    """The progress of commands: bars on stderr."""
    from steer2edit.progress import bar

    return bar


def print_result(result: Any, as_json: bool, render: Callable[[Any], str]) -> None:
    """A result on stdout, as JSON or as text. JSON objects also hold the run's notices, where there are any."""
    said = notices()
    if as_json and said and isinstance(result, dict):
        result = {**result, "notices": said}
    click.echo(json.dumps(result, indent=1, default=list) if as_json else printable(render(result)))


def only_statistics(given: dict[str, Any]) -> bool:
    if given["data"] or given["behavior"]:
        raise click.UsageError("--stats stands in place of --data and --behavior; give one of the three")
    return True


def read_behavior(given: dict[str, Any], vectors: Any = None) -> Any:
    """The behaviour that was given; beside vectors from elsewhere, none need be, and the background text is read alone."""
    from steer2edit.data.behavior import Behavior

    if vectors is not None and not given["data"] and not given["behavior"]:
        return Behavior(str(vectors.source.get("name", "imported vectors")), (), given["system"], given["span"])
    if bool(given["data"]) == bool(given["behavior"]):
        raise click.UsageError("give exactly one of --data, --behavior and (where there is one) --stats")
    if given["data"]:
        return Behavior.from_data(given["data"], given["system"], given["span"])
    return Behavior.builtin(given["behavior"], given["system"], given["span"])


def read_vectors(given: dict[str, Any]) -> Any:
    """The vectors of --vectors, or None."""
    from steer2edit.importers import read_vectors as read

    return read(given["vectors_file"]) if given["vectors_file"] else None


def capture_given(given: dict[str, Any], checkpoint: Any, spec: Any, loaded: Any = None) -> Any:
    """The statistics of the data that was given; the model is loaded once the data is known to be good."""
    from steer2edit.capture.run import capture_statistics
    from steer2edit.runtime.model import load_model

    behavior, background = read_behavior(given), read_background(given)
    loaded = load_model(checkpoint, spec, read_runtime(given)) if loaded is None else loaded
    return capture_statistics(
        loaded,
        checkpoint,
        behavior,
        background=background,
        batch_tokens=given["batch_tokens"],
        progress=progress_bar(),
    )


def read_held_out(given: dict[str, Any]) -> Any:
    """The questions of --eval, or those that come with --behavior; None where there are neither."""
    from steer2edit.data.questions import builtin_questions, read_questions

    if given["questions"]:
        return read_questions(given["questions"])
    return builtin_questions(given["behavior"]) if given["behavior"] else None


def read_method_options(given: dict[str, Any]) -> Any:
    from dataclasses import fields

    from steer2edit import methods

    options_class = methods.load(given["method"]).Options
    known = {field.name for field in fields(options_class)}
    chosen = {name: given[name] for name in _METHOD_OPTIONS if given[name] is not None}
    if strange := sorted(chosen.keys() - known):
        names = {"stable": "all-components", "background": "background-weight"}
        flags = ", ".join(f"--{names.get(name, name).replace('_', '-')}" for name in strange)
        raise click.UsageError(f"the method {given['method']} has no option {flags}")
    if "layers" in chosen:
        chosen["layers"] = read_layers(chosen["layers"])
    return options_class(**chosen)


def read_layers(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise click.BadParameter(
            f"{text!r} is no range of layers; expected one such as 4-20 or 7", param_hint="--layers"
        )
    return int(first), int(last if dash else first)


def read_budgets(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``settle_strength`` that say how strong an edit may be."""
    from steer2edit.architecture import MatrixRole

    budgets = {MatrixRole.ATTN_OUT: given["kl_budget_attn"], MatrixRole.MLP_OUT: given["kl_budget_mlp"]}
    classes = {role: budget for role, budget in budgets.items() if budget is not None}
    return {"strength": given["strength"], "kl_budget": given["kl_budget"], "class_budgets": classes or None}


def read_neutral(given: dict[str, Any]) -> str | None:
    return _text(given["neutral"], "--neutral")


def read_background(given: dict[str, Any]) -> str | None:
    return _text(given["background_file"], "--background")


def _text(path: Path | None, flag: str) -> str | None:
    if path is None:
        return None
    try:
        return read_bytes(path, _TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}", param_hint=flag) from None


def read_runtime(given: dict[str, Any]) -> Any:
    from steer2edit.runtime.model import Runtime

    quieten_transformers()
    return Runtime(given["device"], given["dtype"], _device_map(given["device_map"]), given["trust_remote_code"])


def _device_map(text: str | None) -> Any:
    if text is None or not text.startswith("{"):
        return text
    try:
        return parse_json(text.encode("utf-8", "surrogateescape"), unique=True)
    except ValueError as error:
        raise click.BadParameter(f"it is no JSON object: {error}", param_hint="--device-map") from None


def read_writing(given: dict[str, Any]) -> Any:
    from steer2edit.lowering import Writing

    return Writing(given["jobs"], given["link"])


def quieten_transformers() -> None:
    # it draws bars of its own while it loads; ours is enough
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
