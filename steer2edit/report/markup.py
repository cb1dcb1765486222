"""HTML: tags that escape what enters them, tables, sections, and the style sheet."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from steer2edit.report.drawing import Drawing

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1b1f; --soft: #5b5b66; --line: #dcdce3; --box: #f5f5f8;
  --good: #14713d; --bad: #b3261e; --link: #1d5fae }
@media (prefers-color-scheme: dark) { :root { --bg: #111; --ink: #e8e8ec; --soft: #a6a6b2; --line: #34343c; --box: #1b1b20;
  --good: #6fce97; --bad: #ff9a90; --link: #8dbdf5 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 3rem; max-width: 68rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere }
h1, h2, h3, h4 { line-height: 1.25; text-wrap: balance }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); margin: 0 0 .75rem; letter-spacing: -.01em }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 0 0 .6rem }
h4 { font-size: .8rem; margin: 0 0 .2rem; color: var(--soft); font-weight: 600 }
p, ul { margin: 0 0 .9rem; max-width: 46rem }
ul { padding-left: 1.2rem } li { margin-bottom: .4rem }
small { display: block; font-size: .78rem; font-weight: 400; color: var(--soft) }
.eyebrow, footer { color: var(--soft); font-size: .85rem; margin: 0 0 .4rem }
.verdict { font-size: 1.15rem; line-height: 1.5 }
.better { color: var(--good) } .worse { color: var(--bad) }
.figures { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  align-items: start; margin: 1rem 0 }
figure { margin: 0; max-width: 34rem; break-inside: avoid } figure svg { display: block; width: 100%; height: auto }
.figures > :only-child { max-width: 40rem }
figcaption, caption { font-size: .85rem; color: var(--soft); text-align: left }
figcaption { margin-top: .5rem } caption { padding: 0 0 .4rem; font-weight: 600 }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100% }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; line-height: 1.4 }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; overflow-wrap: normal }
thead th { vertical-align: bottom } tbody th { font-weight: 600; white-space: normal; max-width: 15rem;
  overflow-wrap: anywhere; position: sticky; left: 0; background: var(--bg) }
#candidates tbody th { min-width: clamp(7.5rem, 16vw, 11rem) }
dl { margin: 1rem 0; font-size: .9rem }
dl div { display: grid; grid-template-columns: clamp(6.5rem, 30%, 13rem) minmax(0, 1fr); gap: .2rem 1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line) }
dt { color: var(--soft) } dd { margin: 0; font-variant-ligatures: none }
article { background: var(--box); border-radius: .5rem; padding: 1rem; margin: 0 0 1rem; break-inside: avoid }
.sides { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.said { white-space: pre-wrap; margin-bottom: 0 } h3.said { margin-bottom: .6rem; text-wrap: wrap }
.sides .said { font-size: .95rem }
pre { background: var(--box); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.5 }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: normal }
details { margin: 1rem 0 } summary { cursor: pointer; color: var(--link) }
footer { margin: 3rem 0 0; padding-top: 1rem; border-top: 1px solid var(--line) }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .scroll { overflow: visible } pre { white-space: pre-wrap }
  details::details-content { content-visibility: visible; block-size: auto } th, td { white-space: normal } }
"""


class Html(str):
    """A text that is HTML. Every other text is escaped where it enters a tag."""


def _text(value: object) -> str:
    if isinstance(value, Html):
        return value
    # halves of surrogate pairs cannot be written, and control characters may not stand in HTML
    plain = "".join(c if c.isprintable() or c in "\n\t " else "\u00a0" if c.isspace() else "\ufffd" for c in str(value))
    return html.escape(plain)


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. An attribute whose name is a keyword of Python ends in an underscore: ``class_``."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(map(_text, children))}</{name}>")


def joined(*parts: object) -> Html:
    """Parts one after the other, with spaces between them."""
    return Html(" ".join(_text(part) for part in parts if part != ""))


def section(name: str, title: str, *children: Html) -> Html:
    """A section with its heading; an empty text where it has no contents."""
    if not any(children):
        return Html("")
    return Html(
        f"\n{tag('section', tag('h2', title, id=f'h-{name}'), *children, id=name, aria_labelledby=f'h-{name}')}"
    )


def table(caption: str, heads: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table in a box that scrolls. The first cell of each row is a heading."""
    top = tag("tr", *(tag("th", head, scope="col") for head in heads))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    content = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body))
    # focusable, so that the keyboard can scroll it
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def fact_list(facts: Sequence[tuple[str, object]]) -> Html:
    """Names with their values."""
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts))


def figures(drawings: Iterable[Drawing]) -> Html:
    """Drawings side by side, each with its caption."""
    shown = [tag("figure", Html(one.svg()), tag("figcaption", one.caption)) for one in drawings]
    return tag("div", *shown, class_="figures") if shown else Html("")


def folded(title: str, content: Html) -> Html:
    """Content that the reader opens with a click."""
    return tag("details", tag("summary", title), content)


def code(*lines: str) -> Html:
    """Lines of code."""
    return tag("pre", tag("code", "\n".join(lines)), tabindex="0")
