"""Activation addition: hooks add a vector at every token, after one block or at every writer."""

from __future__ import annotations

from collections.abc import Mapping

from operator_rows.row import ADAPTERS, EXACT, MEAN_EFFECT, Hook, Row
from operator_rows.subject import Subject

_CARRIED = {"checkpoint": EXACT, "lora": EXACT}


def _after(subject: Subject, key: str) -> Mapping[str, Hook]:
    """The stream's difference after block 1, added to the output of one of its writers."""
    v = subject.statistics.difference("residual.1").float()
    return {subject.spec.site(key).module: lambda x, y: y + v}


def _at_writers(subject: Subject) -> Mapping[str, Hook]:
    vectors = {site.module: subject.statistics.difference(site.key).float() for site in subject.spec.sites}
    return {module: lambda x, y, v=v: y + v for module, v in vectors.items()}  # type: ignore[misc]


ROWS = (
    Row(
        "Activation steering at every writer",
        "y + v at every writer, each its own v",
        "--method constant --place writers",
        "a hook on every writer adds its vector at every token",
        _at_writers,
        exactness="exact where every writer has a bias or can get one, refused elsewhere",
        carried={**_CARRIED, **MEAN_EFFECT},
    ),
    Row(
        "ASC (2507.04742), without a bias",
        "h + v (a·x), a·x near one",
        "--method constant --layer 1 --stand-in",
        "a hook on the block's attention adds v at every token",
        lambda subject: _after(subject, "attn_out.1"),
        exactness="approximate: the best edit of rank 1, with its error in the plan; random models are the worst case",
        carried={**dict.fromkeys(ADAPTERS, 1.3), **MEAN_EFFECT},
    ),
)
