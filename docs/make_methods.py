"""Writes docs/methods.md, the table of all methods and their options: python docs/make_methods.py"""

from __future__ import annotations

from pathlib import Path

from steer2edit import methods
from steer2edit.options import AnyLayer, Between, Option, options_of

HEAD = """# Methods and their options

Made by `python docs/make_methods.py` from `steer2edit/methods/`. An option is a flag of `compile` and `plan`; the last column is
what `tune` tries. How to write a method of your own: [extending](extending.md).
"""


def page() -> str:
    """The text of methods.md."""
    parts = [HEAD]
    for name in methods.names():
        module = methods.load(name)
        default = " (the default)" if name == methods.METHOD else ""
        summary = next(line for line in (module.__doc__ or "").splitlines() if line.strip())
        rows = [_row(one) for one in options_of(module.Options)]
        table = "\n".join(["| flag | meaning | default | tune |", "|---|---|---|---|", *rows])
        parts.append(f"## {name}{default}\n\n{summary}\n\n{table}\n")
    return "\n".join(parts)


def _row(one: Option) -> str:
    values = " " + "\\|".join(one.choices) if one.choices else ""
    text = one.help.replace("|", "\\|")
    default = one.shown_default or ("" if one.default is None or one.kind is bool else str(one.default))
    return f"| `{', '.join(one.flags)}`{values} | {text} | {default} | {_search(one)} |"


def _search(one: Option) -> str:
    match one.search:
        case Between(low, high, log):
            return f"{low:g} to {high:g}{', logarithmic' if log else ''}"
        case AnyLayer():
            return "any layer"
        case None:
            return ""
    return "every value"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(page(), encoding="utf-8")
