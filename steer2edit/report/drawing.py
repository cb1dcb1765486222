"""Drawing with matplotlib, as a PNG or as an SVG that takes font and colours from its page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from steer2edit.errors import Steer2EditError

WIDTH = 4.6
"""Width of a figure in inches. On a page 390 px wide, text of 9 points can still be read."""
INK = "#010203"
"""Stands for the page's own text colour: black in a file, ``currentColor`` in a page."""
BLUE, ORANGE, GREY = "#2f7fd6", "#d2691e", "#808080"
"""Colours of data. Each has a contrast of at least 3 : 1 on white and on #111."""
_STYLE = {
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "steer2edit",
    "svg.image_inline": True,
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its name (for files and ids), what it shows in words, and a caption."""

    name: str
    alt: str
    caption: str
    figure: Any

    def png(self) -> bytes:
        """The figure as a PNG, on white, at 200 dots per inch."""
        return saved(self.figure, "png", dpi=200, facecolor="white")

    def svg(self) -> str:
        """An ``<svg>`` for the body of a page, which scales with its box.

        It takes the page's font and text colour. Every id in it begins with ``name``.
        """
        # of the salted figure alone: no date, no metadata
        root = ElementTree.fromstring(saved(self.figure, "svg", metadata={"Date": None}))
        return _inline(root, self.name, one_line(self.alt, 1000))


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """A new figure, and within the block its style. Raises Steer2EditError without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise Steer2EditError("plots need matplotlib: pip install 'steer2edit[plots]'") from None
    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def saved(figure: Any, kind: str, **options: Any) -> bytes:
    """A figure as a file of the ``kind``, in the same style; ``options`` go to ``savefig``."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # names may be in scripts that its font has no glyphs for
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def one_line(text: str, longest: int = 60) -> str:
    """A name from data as one line, short enough for a figure."""
    plain = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    plain = " ".join(plain.split()).lstrip("_")
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def _inline(root: ElementTree.Element, name: str, alt: str) -> str:
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        tag = element.tag.rpartition("}")[2]
        if tag in ("metadata", "style"):
            parents[element].remove(element)
        element.tag = tag
        element.attrib = {key.rpartition("}")[2]: _attribute(key, value, name) for key, value in element.attrib.items()}
    used = "".join(value for element in root.iter() for value in element.attrib.values() if "#" in value)
    for element in root.iter():
        if element.attrib.get("id", "") not in used:
            del element.attrib["id"]
    box = root.attrib["viewBox"]
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-label": alt,
        "style": "stroke-linejoin:round;stroke-linecap:butt",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    """The value of one attribute, for an SVG inside a page."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*", "font-family: inherit", value).replace(INK, "currentColor")
    return value
