"""The command that reads what others made: steering vectors, or finished edits as plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steer2edit.cli.options import PATH, json_option, open_model, print_result, read_layers


@click.command("import")
@click.argument("source")
@click.option(
    "-o", "--out", type=PATH, required=True, help="*.vectors.safetensors for vectors, *.plan.safetensors for edits."
)
@click.option("--model", help="The base that finished edits belong to; vectors need none, and are checked against it.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--layers", help="Where a file's single vector goes, such as 12 or 4-20.")
@click.option(
    "--offset",
    type=int,
    default=0,
    show_default=True,
    help="Added to every layer number; -1 for files numbered as transformers' hidden_states.",
)
@click.option("--feature", "features", type=int, multiple=True, help="An SAE's feature; may be repeated, and adds up.")
@json_option
def import_(source: str, out: Path, model: str | None, as_json: bool, **given: Any) -> None:
    """Read steering vectors or finished edits that were made elsewhere.

    Vectors: control-vector GGUF (repeng, llama.cpp), the steering-vectors library's SteeringVector, Steer2Edit's direction
    files, .pt, .npz, .npy and .safetensors by layer, SAELens folders. Edits (with --model): Steer2Edit's edit packs, PEFT and
    GGUF LoRA adapters. SOURCE may be a repository on the Hub.
    """
    from steer2edit.capture.vectors import Vectors
    from steer2edit.files.hub import fetch
    from steer2edit.importers import read
    from steer2edit.importers.source import Reading
    from steer2edit.report.tables import describe_plan, render_plan

    layers = read_layers(given["layers"]) if given["layers"] else None
    found = read(fetch(source), Reading(layers, given["offset"], given["features"]))
    if isinstance(found, Vectors):
        if model is not None:
            found.check(open_model(model, given)[1])
        found.save(out)
        result = {
            "vectors": str(out),
            "source": dict(found.source),
            "norms": {place: float(vector.norm()) for place, vector in found.directions.items()},
        }
        print_result(result, as_json, _render)
        return
    if model is None:
        raise click.UsageError(f"{source} holds finished edits: name their base with --model")
    plan = found.plan(*open_model(model, given))
    plan.save(out)
    print_result(
        {"plan": str(out), **describe_plan(plan)}, as_json, lambda r: f"{render_plan(plan, top=5)}\n\n{r['plan']}"
    )


def _render(result: dict[str, Any]) -> str:
    source = result["source"]
    lines = [f"{source['format']}{', made for ' + source['model'] if source.get('model') else ''}"]
    lines += [f"  {place:<14} ‖v‖ = {norm:.4g}" for place, norm in result["norms"].items()]
    if source.get("left_out"):
        lines.append(f"  left out, because no block writes it: {', '.join(source['left_out'])}")
    return "\n".join([*lines, result["vectors"]])
