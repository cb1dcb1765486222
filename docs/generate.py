"""Writes what the documents derive from the code: python docs/generate.py

A page holds blocks between two comments, ``<!-- made by docs/generate.py: NAME -->`` and ``<!-- end of NAME -->``. ``BLOCKS``
has a function for each name, which gives the text between them. The rest of a page is written by hand. A test fails when a
block is not what its function gives.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from steer2edit import importers, methods, targets
from steer2edit.architecture.families import FAMILIES
from steer2edit.architecture.family import Family, Mixture
from steer2edit.architecture.mixtures import MIXTURES
from steer2edit.architecture.refusals import REFUSED
from steer2edit.architecture.wrappers import MULTIMODAL
from steer2edit.cli.app import main as command_line
from steer2edit.cli.command import Command
from steer2edit.cli.flags import Flag
from steer2edit.data import formats, metric_choice
from steer2edit.data.behavior_file import behavior_files, open_behavior
from steer2edit.evaluation.projection import PROJECTION
from steer2edit.options import AnyLayer, Between, Option, options_of
from steer2edit.targets.lora import NO_ADAPTER

DOCS = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- made by docs/generate\.py: (\S+) -->\n)(.*?)(<!-- end of \2 -->\n)", re.DOTALL)
_PLAIN = Family("", ())
_LAYOUTS = {
    "separate": "a tensor each",
    "out_in": "one tensor, experts × out × in",
    "in_out": "one tensor, experts × in × out",
    "stacked": "one tensor, experts stacked",
}


def pages() -> dict[Path, str]:
    """The pages that have blocks, each with the text that it should have. Raises KeyError for a block of an unknown name."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    made = {
        path: _BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[4]}", text)
        for path, text in texts.items()
    }
    return {path: text for path, text in made.items() if _BLOCK.search(text)}


def block_names(text: str) -> list[str]:
    """The names of the blocks in a page's text."""
    return [match[2] for match in _BLOCK.finditer(text)]


def _counts() -> str:
    dense, mixtures = (sum(len(family.model_types) for family in kind) for kind in (FAMILIES, MIXTURES))
    kinds = f"{dense} dense model types, {mixtures} mixtures of experts and {len(MULTIMODAL)} multimodal models"
    return f"{kinds} are described and tested. {len(REFUSED)} types are refused, each with its reason."


def _dense_families() -> str:
    return _table(["layout", "model types", "attention, mixer", "MLP", "norm after", "stored"], map(_dense, FAMILIES))


def _mixtures() -> str:
    heads = ["layout", "model types", "attention, mixer", "experts", "stored", "shared expert", "router", "bias"]
    return _table(heads, map(_mixture, MIXTURES))


def _methods() -> str:
    """A section for each method: what it is, and its options."""
    sections = []
    for name in methods.names():
        module = methods.load(name)
        default = " (the default)" if name == methods.METHOD else ""
        summary = next(line for line in (module.__doc__ or "").splitlines() if line.strip())
        table = _table(["flag", "meaning", "default", "tune"], map(_option, options_of(module.Options)))
        sections.append(f"## {name}{default}\n\n{summary}\n\n{table}\n")
    return "\n".join(sections)


def _commands() -> str:
    """A section for each command: what it does, and its flags under their headings."""
    return "\n".join(_command(words, command) for words, command in _leaves(command_line))


def _leaves(group: click.Group, words: tuple[str, ...] = ("steer2edit",)) -> Iterable[tuple[tuple[str, ...], Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _leaves(command, (*words, name))
        elif isinstance(command, Command):
            yield (*words, name), command


def _command(words: tuple[str, ...], command: Command) -> str:
    context = click.Context(command)
    params = command.get_params(context)
    places = [param.make_metavar(context) for param in params if isinstance(param, click.Argument)]
    rows = []
    for param in params:
        record = param.get_help_record(context)
        # the methods' own options have a page of their own
        if isinstance(param, Flag) and record and not str(param.name).startswith("method_"):
            rows.append([text.replace("|", "\\|") for text in (_code(record[0]), record[1], param.heading)])
    summary = " ".join((command.help or "").split())
    return f"## {' '.join((*words[1:], *places))}\n\n{summary}\n\n{_table(['flag', 'meaning', 'heading'], rows)}\n"


def _targets() -> str:
    modules = {name: targets.load(name) for name in targets.names()}
    rows = [
        [_code(f"--to {name}"), targets.summary(name), _yes(module.WHOLE_MODEL), _yes(module.STRUCTURE)]
        for name, module in modules.items()
    ]
    return _table(["target", "what it is", "a whole model", "can remove experts and layers"], rows)


def _operators() -> str:
    """A row for each operator that the tests compare with its paper's hooks."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from operator_rows import all_rows

    measured = json.loads((DOCS / "operators.measured.json").read_text(encoding="utf-8"))
    heads = ["system", "operator", "at run time", "command", "as weights", "carried by", measured["model"]]
    rows = [
        [
            *(row.system, row.operator, row.hook, _code(row.command), row.exactness, row.carried_text),
            _error(measured["rows"].get(row.name)),
        ]
        for row in all_rows()
    ]
    return _table(heads, [[text.replace("|", "\\|") for text in row] for row in rows])


def _error(measured: Mapping[str, Any] | None) -> str:
    """An operator's error in a checkpoint of the measured model; – where it was not measured there."""
    error = (measured or {}).get("errors", {}).get("checkpoint")
    return "–" if error is None else f"{error:.0e}".replace("e-0", "e-") if error < 0.01 else f"{error:g}"


def _measured_behaviors() -> str:
    """What the files of the built-in behaviours say was measured, those with most losses first."""
    found = [(name, one) for name in behavior_files() for one in open_behavior(name).measured]
    found.sort(key=lambda pair: (-len(pair[1].losses), pair[0]))
    rows = [
        [
            f"`{name}`, {one.model}",
            str(one.metrics[0]),
            "; ".join(str(m).removeprefix(f"{PROJECTION} ") for m in one.metrics if m.name == PROJECTION) or "–",
            {True: "yes", False: "no", None: "–"}[one.steerable],
            "; ".join(map(str, one.losses)) or "–",
        ]
        for name, one in found
    ]
    return _table(["behaviour, model", "its metric, base → edit", PROJECTION, "steerable here", "worse"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": _commands,
    "behaviors.measured": _measured_behaviors,
    "families.counts": _counts,
    "families.dense": _dense_families,
    "families.no-adapter": lambda: f"In {_names(NO_ADAPTER)}, PEFT refuses to wrap Mamba's `out_proj`.",
    "families.mixtures": _mixtures,
    "families.multimodal": lambda: f"{_names(MULTIMODAL)}.",
    "families.refused": lambda: _table(["model types", "because"], _refused()),
    "methods": _methods,
    "operators": _operators,
    "targets": _targets,
    "formats": formats.table,
    "metrics": metric_choice.table,
    "importers": lambda: "\n".join(f"- {importer.description}" for importer in importers.importers()),
}


def _option(one: Option) -> list[str]:
    values = " " + "\\|".join(one.choices) if one.choices else ""
    default = one.shown_default or ("" if one.default is None or one.kind is bool else str(one.default))
    return [f"`{', '.join(one.flags)}`{values}", one.help.replace("|", "\\|"), default, _search(one)]


def _search(one: Option) -> str:
    match one.search:
        case Between(low, high, log):
            return f"{low:g} to {high:g}{', logarithmic' if log else ''}"
        case AnyLayer():
            return "any layer"
        case None:
            return ""
    return "every value"


def _dense(family: Family) -> list[str]:
    return [
        family.name,
        _names(family.model_types),
        _attention(family),
        "–" if _only_mixers(family) and family.mlp_out == _PLAIN.mlp_out else _code(family.mlp_out),
        _norms(family),
        _stored(family),
    ]


def _mixture(family: Family) -> list[str]:
    mixture = family.mixture or Mixture()
    return [
        family.name,
        _names(family.model_types),
        _attention(family),
        _code(mixture.output),
        _LAYOUTS[mixture.layout],
        _code(mixture.shared) if mixture.shared else "–",
        _code(mixture.router),
        f"{_code(mixture.bias)} (on {mixture.bias_of})" if mixture.bias else "–",
    ]


def _only_mixers(family: Family) -> bool:
    return family.partial and family.mixture is None


def _attention(family: Family) -> str:
    leaves = family.mixers if _only_mixers(family) else (family.attn_out, *family.mixers)
    return ", ".join(map(_code, dict.fromkeys(leaves)))


def _norms(family: Family) -> str:
    named = [name for name in (family.attn_norm, family.mlp_norm) if name]
    if not named:
        return "–"
    offset = " (1 + value)" if family.norm_offset else ""
    return ", ".join(map(_code, named)) + offset + (", not in blocks with a mixer" if family.bare_mixers else "")


def _stored(family: Family) -> str:
    return "in × out" if family.orientation == "in_out" else "out × in"


def _refused() -> list[list[str]]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in REFUSED.items():
        by_reason[reason].append(name)
    return [[_names(names), reason] for reason, names in by_reason.items()]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _code(text: str) -> str:
    return f"`{text}`"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
