"""Every operator that is compiled, beside the hooks with which its paper does the same at run time.

A row is one :class:`operator_rows.row.Row` in the list ``ROWS`` of a file here; files are found by themselves. A row says the
system, the operator, the command, how the hook does it, which targets carry it, and how large the error may be. Its ``hooks``
are written from the paper's formula and the captured moments, and know nothing of the plan. ``test_operators.py`` runs each
row on tiny models, ``docs/operators.md`` is written from the rows, and ``benchmarks/operators.py`` measures them on real models.
"""

from __future__ import annotations

import importlib
import pkgutil

from operator_rows.row import Row


def all_rows() -> list[Row]:
    """The rows of all files, in the order of their systems."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("row", "subject"))
    rows = [row for name in names for row in importlib.import_module(f"{__name__}.{name}").ROWS]
    return sorted(rows, key=lambda row: (row.system, row.command))
