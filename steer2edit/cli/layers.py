"""``layers``: how much each block changes the residual stream on a text, before some are silenced or removed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import JsonFlags, ModelFlags, progress_bar, read_text
from steer2edit.cli.output import print_result
from steer2edit.options import option


@dataclass(frozen=True)
class VoidFlags(FlagGroup):
    """On which text, and from when on a layer counts as doing something."""

    heading: ClassVar[str] = "Data"

    text: Path | None = option(None, "Text to read.", shown_default="the packaged prose")
    threshold: float = option(
        0.1, "Change of the stream, as a share of its length, below which a layer is void for a token.", minimum=0
    )


@command(data=VoidFlags, model_flags=ModelFlags, printed=JsonFlags)
@click.argument("model")
def layers(model: str, data: VoidFlags, model_flags: ModelFlags, printed: JsonFlags) -> None:
    """List how much each layer of MODEL changes the residual stream, and for how many tokens hardly at all."""
    from steer2edit.capture.layer_changes import layer_changes
    from steer2edit.data import contrast

    text = read_text(data.text, "--text") or contrast.background_text()
    checkpoint, spec = model_flags.open(model)
    loaded = model_flags.load(checkpoint, spec)
    rows, tokens = layer_changes(loaded, [text], data.threshold, progress_bar())
    result = {"tokens": tokens, "threshold": data.threshold, "layers": [asdict(row) for row in rows]}
    print_result(result, printed.as_json, lambda result: _render(result, model))


def _render(result: dict[str, Any], model: str) -> str:
    import shlex

    from tabulate import tabulate

    rows = result["layers"]
    table = [[row["layer"], row["change"], row["growth"], row["cosine"], f"{row['void']:.1%}"] for row in rows]
    heads = [
        "layer",
        "mean change",
        "mean growth",
        "mean cosine",
        f"tokens changed by less than {result['threshold']:g}",
    ]
    # where no token calls a layer void, that which changes the stream least
    most = max(rows, key=lambda row: (row["void"], -row["change"]))
    name, layer = shlex.quote(model), most["layer"]
    return "\n".join(
        [
            f"Over {result['tokens']:,} tokens. Change and growth are shares of the stream's length.",
            "",
            tabulate(table, headers=heads, floatfmt=".3f"),
            "",
            "Next:",
            f"  steer2edit plan {name} --method silence --components layer.{layer} --prune -o without-{layer}.plan.safetensors",
        ]
    )
