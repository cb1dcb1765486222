"""The receipt of an artefact, ``steer2edit.json``: its format, and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer2edit.checkpoint import read_json
from steer2edit.errors import PlanError, shown
from steer2edit.files.layout import RECEIPT
from steer2edit.files.schema import MAYBE, TEXT, check
from steer2edit.plan import BASE, DATA, MEASURED, METHOD
from steer2edit.targets import load

FORMAT = "steer2edit.receipt.1"


_CARD: Any = dict.fromkeys(("license?", "license_name?", "license_link?", "pipeline_tag?"), TEXT)


_RECEIPT: Any = {
    "target": str,
    "exactness": str,
    "base": BASE,
    "plan": {"file": str, "sha256": str},
    "method": METHOD,
    "measured": MEASURED,
    "data": DATA,
    "changed": [{"tensor": str, "op": str, "norm": MAYBE, "sha256_before": TEXT, "sha256_after": TEXT}],
    "notes": [str],
    "details": {},
    "versions": {str: str},
    "files?": [str],
    "card?": {**_CARD, "language?": [str], str: ()},
    "card_sha256?": TEXT,
}


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of an artefact. Raises PlanError where there is none that this version reads."""
    if not (folder / RECEIPT).is_file():
        raise PlanError(f"{folder} holds no {RECEIPT}: it is not an artefact of steer2edit")
    receipt = read_json(folder / RECEIPT)
    if receipt.get("format") != FORMAT:
        raise PlanError(f"{folder / RECEIPT} has the format {shown(receipt.get('format'))}, expected {FORMAT!r}")
    try:
        check(receipt, _RECEIPT, RECEIPT)
    except ValueError as error:
        raise PlanError(f"{folder}: {error}") from None
    load(receipt["target"])
    return receipt
