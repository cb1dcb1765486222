"""``gate``: the edit that comes nearest to a vector added under a condition, as a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from steer2edit.cli.command import command
from steer2edit.cli.data_options import CaptureFlags, ProtectFlags, VectorsFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import JsonFlags, ModelFlags, ReplaceFlags, progress_bar
from steer2edit.cli.output import print_result
from steer2edit.options import option


@dataclass(frozen=True)
class GateFlags(FlagGroup):
    """The condition, and where the vector is added."""

    heading: ClassVar[str] = "Gate"

    condition: str = option(
        ...,
        "Direction of the condition: a built-in behaviour, a statistics file or steering vectors.",
        metavar="DIRECTION",
    )
    condition_layer: int = option(..., "Read the condition after this layer's block.", minimum=0)
    layer: int = option(..., "Add the vector in this layer, which is later than the condition's.", minimum=1)
    gate: Literal["cosine", "relu"] = option(
        "cosine",
        "Open where the cosine with the direction is above the threshold, or by as much as a product is above it.",
    )
    threshold: float | None = option(
        None, "Threshold of the gate.", shown_default="the middle between the condition's classes; 0 for relu"
    )
    sites: Literal["attn", "mlp"] = option("attn", "The matrix of that layer that carries the vector.")


@dataclass(frozen=True)
class GateOut(FlagGroup):
    """Where the plan goes."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Plan file to write, *.plan.safetensors.", "-o", "--out")


@command(
    data=CaptureFlags,
    vectors=VectorsFlags,
    gate_flags=GateFlags,
    model_flags=ModelFlags,
    output=GateOut,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def gate(
    model: str,
    data: CaptureFlags,
    vectors: VectorsFlags,
    gate_flags: GateFlags,
    model_flags: ModelFlags,
    output: GateOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Write the plan that comes nearest to adding a vector only where a condition holds.

    The vector is that of the contrast data, or of --vectors. A condition does not become weights; the plan is a regression on
    what the matrix reads, and its error on texts that had no part in it is printed and stored.
    """
    from dataclasses import replace as replaced

    from steer2edit.capture.background import background_examples
    from steer2edit.capture.gate import Gate, fit_gate, gate_plan
    from steer2edit.capture.run import capture_statistics
    from steer2edit.capture.vectors import Vectors
    from steer2edit.data.behavior import Behavior
    from steer2edit.data.prompts import prompt_digest

    vectors.check()
    replace.check(output.out, "plan")
    if vectors.vector != "mean":
        raise click.UsageError(
            f"gate takes the mean difference, or a file of --vectors: --vector {vectors.vector} is neither"
        )
    condition = ProtectFlags(protect=(gate_flags.condition,)).read(data, "--condition")[0]
    steering = vectors.read()
    behavior = data.read_behavior(steering)
    background = data.read_background()
    checkpoint, spec = model_flags.open(model)
    loaded = model_flags.load(checkpoint, spec)
    arguments: dict[str, Any] = {
        "background": "", "chat": (), "batch_tokens": data.batch_tokens, "progress": progress_bar(),
    }  # fmt: skip
    if steering is not None:
        steering.check(spec)
        source: Any = steering
    else:
        source = capture_statistics(loaded, checkpoint, behavior, **arguments)
    texts = [
        *behavior.encode(loaded.tokenizer, loaded.context),
        *background_examples(loaded, background, progress_bar()),
    ]
    seen = {prompt_digest(example.prompt) for example in behavior.examples}
    if isinstance(condition, Behavior):
        seen |= {prompt_digest(example.prompt) for example in condition.examples}
        shift = 1 + max((one.row for one in texts), default=0)
        more = condition.encode(loaded.tokenizer, loaded.context)
        texts += [replaced(one, row=shift + one.row) for one in more]
        condition = capture_statistics(loaded, checkpoint, condition, **arguments)
    elif isinstance(condition, Vectors):
        condition.check(spec)
    direction, middle = _direction(condition, gate_flags.condition_layer, gate_flags.condition)
    threshold = gate_flags.threshold
    if threshold is None:
        if gate_flags.gate == "cosine" and middle is None:
            raise click.UsageError("--condition is a file of vectors, which names no classes: give --threshold")
        threshold = middle if gate_flags.gate == "cosine" and middle is not None else 0.0
    site = _site(spec, gate_flags.layer, gate_flags.sites)
    vector, _ = _direction(source, gate_flags.layer, behavior.name)
    asked = Gate(direction, gate_flags.condition_layer, threshold, gate_flags.gate)
    fit = fit_gate(loaded, texts, site, asked, batch_tokens=data.batch_tokens, progress=progress_bar())
    condition_name = Path(gate_flags.condition).name
    plan = gate_plan(
        checkpoint, spec, site, vector, asked, fit, condition=condition_name, name=behavior.name, prompts=sorted(seen)
    )
    plan.save(output.out)
    result = {"plan": str(output.out), **plan.method}
    print_result(result, printed.as_json, lambda result: _render(result, model))


def _direction(source: Any, layer: int, name: str) -> tuple[Any, float | None]:
    """The direction of statistics or vectors after a layer, and the middle between the classes' cosines with it."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.data.answers import LABELS
    from steer2edit.errors import PlanError

    key = f"residual.{layer}"
    if not isinstance(source, Statistics):
        if key not in source.directions:
            raise PlanError(
                f"{name} has no vector after layer {layer}; it has {', '.join(sorted(source.directions)[:6])}"
            )
        return source.directions[key], None
    direction = source.difference(key)
    if not bool(direction.any()):
        raise PlanError(f"{name} has no direction after layer {layer}: both classes are alike there")
    cosines = []
    for label in LABELS:
        mean = source.mean(key, "output", label)
        cosines.append(float(mean @ direction / (mean.norm() * direction.norm())))
    return direction.float(), sum(cosines) / 2


def _site(spec: Any, layer: int, kind: str) -> Any:
    from steer2edit.architecture import MatrixRole
    from steer2edit.errors import PlanError

    role = MatrixRole.ATTN_OUT if kind == "attn" else MatrixRole.MLP_OUT
    found = [site for site in spec.sites if site.layer == layer and site.role.kind is role and site.expert is None]
    if not found:
        raise PlanError(
            f"layer {layer} has no matrix for --sites {kind}; this model has the layers 0-{spec.layers - 1}"
        )
    return found[0]


def _render(result: dict[str, Any], model: str) -> str:
    import shlex

    name = shlex.quote(result["plan"])
    shut = "and it is never shut" if result["when_shut"] is None else f"{result['when_shut']:.3g} where it is shut"
    lines = [
        f"The gate is open for {result['open_share']:.1%} of the tokens, and {result['gate_mean']:.3g} on average.",
        f"The edit misses {result['held_out_error']:.1%} of the hook's energy on {result['held_out_texts']} held-out texts; "
        f"a constant would miss {result['constant_error']:.1%}.",
        f"It adds {result['when_open']:.3g} of the vector where the gate is open, {shut}.",
        "",
        f"Written: {result['plan']}",
        "",
        "Next:",
        f"  steer2edit scale {name} --model {shlex.quote(model)} --kl-budget 0.05 -o {name} --force",
        f"  steer2edit emit {name} {shlex.quote(model)} --to checkpoint --out FOLDER",
    ]
    return "\n".join(lines)
