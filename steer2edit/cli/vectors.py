"""``vectors``: steering vectors that take more than the statistics, from gradients or from a dictionary of activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from steer2edit.cli.command import command
from steer2edit.cli.data_options import CaptureFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import JsonFlags, ModelFlags, ReplaceFlags, progress_bar
from steer2edit.cli.output import print_result
from steer2edit.errors import Steer2EditError, count_of
from steer2edit.options import option


@dataclass(frozen=True)
class KindFlags(FlagGroup):
    """How the vector is made."""

    heading: ClassVar[str] = "Vector"

    kind: Literal["gradient", "dictionary"] = option(
        ..., "Gradients of the preference (GrAInS), or atoms of an activation dictionary (ITDA)."
    )
    steps: int = option(16, "Points on the path of the integrated gradients.", minimum=1)
    tokens: int = option(3, "Tokens of a prompt that are masked at each end of the attributions.", minimum=1)
    layer: int | None = option(
        None, "Take the activations after this layer's block.", minimum=0, shown_default="the middle layer"
    )
    atoms: int = option(512, "Largest number of atoms in the dictionary.", minimum=1)
    sparsity: int = option(8, "Atoms in the decomposition of an activation.", minimum=1)
    missed: float = option(0.1, "Share of an activation's energy above which it becomes an atom.")
    taken: int = option(8, "Atoms that make up the vector: those that differ most between the classes.", minimum=1)

    def check(self) -> None:
        """Raise UsageError for options of the other kind."""
        other = ("layer", "atoms", "sparsity", "missed", "taken") if self.kind == "gradient" else ("steps", "tokens")
        if unused := [name for name in other if getattr(self, name) != getattr(type(self), name)]:
            raise click.UsageError(f"--{unused[0]} would change nothing: it does not belong to --kind {self.kind}")


@dataclass(frozen=True)
class VectorsOut(FlagGroup):
    """Where the vectors go."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Vectors file to write, *.vectors.safetensors.", "-o", "--out")


@command(
    kind=KindFlags,
    data=CaptureFlags,
    model_flags=ModelFlags,
    output=VectorsOut,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def vectors(
    model: str,
    kind: KindFlags,
    data: CaptureFlags,
    model_flags: ModelFlags,
    output: VectorsOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Make steering vectors of contrast data that take more than means: by gradients, or by a dictionary of activations.

    The file goes to compile or plan as --vectors. Means, principal directions and medians need no file: --vector of compile.
    """
    from steer2edit.capture.attribution import by_gradients
    from steer2edit.capture.background import background_examples
    from steer2edit.capture.dictionary import Settings, by_dictionary

    replace.check(output.out, "vectors")
    kind.check()
    checkpoint, spec = model_flags.open(model)
    settings = Settings(kind.atoms, kind.sparsity, kind.missed, kind.taken)
    layer = spec.layers // 2 if kind.layer is None else kind.layer
    if layer >= spec.layers:
        raise Steer2EditError(f"--layer {layer} is not in this model, which has the layers 0-{spec.layers - 1}")
    behavior, background = data.read_behavior(), data.read_background()
    loaded = model_flags.load(checkpoint, spec)
    examples = behavior.encode(loaded.tokenizer, loaded.context)
    if kind.kind == "gradient":
        found = by_gradients(
            loaded,
            examples,
            name=behavior.name,
            steps=kind.steps,
            tokens=kind.tokens,
            batch_tokens=data.batch_tokens,
            progress=progress_bar(),
        )
    else:
        examples = [*examples, *background_examples(loaded, background, progress_bar())]
        found, _, _ = by_dictionary(
            loaded,
            examples,
            layer,
            settings,
            name=behavior.name,
            batch_tokens=data.batch_tokens,
            progress=progress_bar(),
        )
    found.save(output.out)
    result: dict[str, Any] = {
        "vectors": str(output.out),
        "source": dict(found.source),
        "norms": {place: float(vector.norm()) for place, vector in found.directions.items()},
    }
    print_result(result, printed.as_json, _render)


def _render(result: dict[str, Any]) -> str:
    import shlex

    source = result["source"]
    if "atoms" in source:
        lines = [
            f"A dictionary of {source['size']} activations after layer {source['layer']}; its decompositions miss "
            f"{source['missed']:.1%} of the contrast data's energy.",
            "",
            "Atoms that differ most between the classes:",
            *(
                f"  {one['atom']:>5}  difference {one['difference']:+.3g}, {one['standard_errors']:+.1f} standard errors; "
                f"an activation of a {one['label']} text, row {one['row']}, token {one['position']}"
                for one in source["atoms"]
            ),
        ]
    else:
        lines = [
            f"Gradients of {count_of(source['pairs'], 'pair')}, {count_of(source['steps'], 'step')}, "
            f"{count_of(source['tokens'], 'token')} masked at each end."
        ]
    lines += ["", "Norm of the vector at each place:"]
    lines += [f"  {place:<14} {norm:.4g}" for place, norm in result["norms"].items()]
    command = f"  steer2edit compile MODEL --vectors {shlex.quote(result['vectors'])} --out FOLDER"
    return "\n".join([*lines, "", f"Written: {result['vectors']}", "", "Next:", command])
