"""Whether a receipt says what base and plan give: each of its claims is computed again and compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer2edit import __version__
from steer2edit.artefact.emit import base_notes, exactness_of
from steer2edit.artefact.model_card import inherited, model_card
from steer2edit.errors import shown
from steer2edit.files.layout import CARD, PLAN, RECEIPT
from steer2edit.lowering import Comparison, Resolved

# sums of floating-point numbers depend on the number of threads
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9


def check_claims(
    receipt: Mapping[str, Any], resolved: Resolved, compared: Comparison, folder: Path
) -> tuple[list[str], list[str]]:
    """The receipt's claims that are false, and remarks on those that cannot be computed again.

    What running the model measured (the KL) cannot be repeated here; the receipt must say what the plan says.
    """
    plan, lowering = resolved.plan, compared.lowering
    expected = {
        "base": asdict(plan.base),
        "plan": {"file": PLAN, "sha256": plan.hash},
        "method": dict(plan.method),
        "measured": plan.measured.to_json(),
        "data": dict(plan.data),
        "exactness": exactness_of(plan, lowering),
    }
    problems = [line for key, value in expected.items() for line in _differences(key, receipt[key], value)]
    problems += _changes(receipt["changed"], [asdict(change) for change in lowering.changes])
    problems += _files(receipt.get("files"), {*compared.files, PLAN})
    for key, value in lowering.details.items():
        problems += _differences(f"details.{key}", receipt["details"].get(key), value)
    notes = [
        f"{RECEIPT}: the remark {shown(note)} is not computed again"
        for note in receipt["notes"]
        if note not in (*lowering.notes, *base_notes(resolved.checkpoint, lowering))
    ]
    notes += [
        f"{RECEIPT}: details.{key} is not computed again"
        for key, value in receipt["details"].items()
        if key not in lowering.details and value
    ]
    wrong = _inherited(receipt, resolved)
    remarks: list[str] = []
    if not problems and not wrong:
        # only then does the receipt hold what a card is made of
        wrong, remarks = _card(receipt, folder)
    return [*problems, *wrong], [*notes, *remarks]


def alike(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same, numbers up to the noise of a sum."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool) or not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        return type(a) is type(b) and bool(a == b)
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    try:
        return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) or (math.isnan(a) and math.isnan(b))
    except OverflowError:  # a whole number past the range of floating-point numbers
        return False


def _differences(key: str, claimed: Any, expected: Any) -> list[str]:
    """A line for each value in which a claim is not what was computed."""
    if alike(claimed, expected):
        return []
    if isinstance(claimed, Mapping) and isinstance(expected, Mapping):
        names = dict.fromkeys([*expected, *claimed])
        return [line for name in names for line in _differences(f"{key}.{name}", claimed.get(name), expected.get(name))]
    return [f"{RECEIPT}: {key} is {shown(claimed)}, expected {shown(expected)}"]


def _changes(claimed: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> list[str]:
    theirs = {change["tensor"]: change for change in claimed}
    ours = {change["tensor"]: change for change in expected}
    problems = []
    if len(theirs) != len(claimed):
        problems.append(f"{RECEIPT}: its list of changes names a tensor twice")
    problems += [f"{RECEIPT}: its list of changes lacks {name}" for name in sorted(ours.keys() - theirs.keys())]
    problems += [
        f"{RECEIPT}: its list of changes has {shown(name)}, which is unchanged"
        for name in sorted(theirs.keys() - ours.keys())
    ]
    for name in sorted(ours.keys() & theirs.keys()):
        wrong = [key for key, value in ours[name].items() if not alike(theirs[name].get(key), value)]
        problems += [
            f"{RECEIPT}: {key} of {name} is {shown(theirs[name].get(key))}, expected {shown(ours[name][key])}"
            for key in wrong
        ]
    return problems


def _files(claimed: Sequence[str] | None, expected: set[str]) -> list[str]:
    # a base that was copied may have more files than the one that the artefact was made from
    strange = sorted(set(claimed or ()) - expected)
    return [f"{RECEIPT}: its list of files has {shown(name)}, which base and plan do not give" for name in strange]


def _inherited(receipt: Mapping[str, Any], resolved: Resolved) -> list[str]:
    """What the receipt says for the card of the base's licence, languages and task."""
    claimed = receipt.get("card")
    expected = json.loads(json.dumps(inherited(resolved.checkpoint)))
    if claimed is None:
        return []
    return [f"{line}, as the base's card says" for line in _differences("card", claimed, expected)]


def _card(receipt: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the card's hash, and remarks on the card."""
    problems: list[str] = []
    notes: list[str] = []
    digest = receipt.get("card_sha256")
    if digest is not None and digest != hashlib.sha256(model_card(receipt).encode()).hexdigest():
        if receipt["versions"].get("steer2edit") == __version__:
            problems.append(f"{RECEIPT}: card_sha256 is not that of the card which this receipt gives")
        else:
            notes.append(f"{CARD} was written by another version of steer2edit, and is not written again")
    try:
        card = (folder / CARD).read_bytes() if (folder / CARD).is_file() else None
    except OSError as error:
        card = None
        notes.append(f"{CARD} cannot be read: {error.strerror or error}")
    if card is not None and hashlib.sha256(card).hexdigest() != digest:
        notes.append(
            f"{CARD} is not the one that emit wrote: somebody edited it, or push filled it in; its text is not proven"
        )
    return problems, notes
