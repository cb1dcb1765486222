"""A folder of data that ``steer2edit data`` made: three files, disjoint by prompt, and the receipt ``data.json``.

``train.jsonl`` holds contrast data, ``select.jsonl`` and ``report.jsonl`` questions: what an edit is made of, chosen by and
reported on. The receipt names the behaviour, its metric and the files' hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer2edit.data.contrast import Example, as_chats, read_contrast
from steer2edit.data.metric_choice import MetricChoice, read_metric
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.questions import Question, Split, read_questions
from steer2edit.errors import DataError, brief, listing, shown
from steer2edit.files.schema import faults as schema_faults
from steer2edit.files.untrusted import JSON_BYTES, parse_json, read_bytes

FORMAT = "steer2edit.data.1"
RECEIPT = "data.json"
TRAIN = "train.jsonl"
HELD_OUT: Mapping[Split, str] = {"select": "select.jsonl", "report": "report.jsonl"}
FILES = (TRAIN, *HELD_OUT.values())
_MAX_BYTES = 1 << 30
_COUNTS: Any = {"offered?": int, "kept?": int}
_RECEIPT: Any = {
    "format": str,
    "behavior": {"name": str, "description?": str, "rubric?": str, "positive?": str, "negative?": str},
    "files": dict.fromkeys(FILES, str),
    "made?": {"way?": str, "positive?": ([str], str)},
    "rows?": _COUNTS,
    "verdict?": ({"word": str}, None),
}


@dataclass(frozen=True)
class DataFolder:
    """A folder whose files are those of its receipt, and share no prompt.

    ``positive`` is the instruction that made the positive answers; None where answers were sorted. ``receipt`` is data.json,
    and ``digest`` the SHA-256 of its bytes.
    """

    path: Path
    name: str
    positive: str | None
    metric: MetricChoice | None
    receipt: Mapping[str, Any]
    digest: str

    def read_pairs(self) -> list[Example]:
        """The contrast data, each text prompt as one user message."""
        return as_chats(read_contrast(self.path / TRAIN))

    def read_questions(self) -> list[Question]:
        """The held-out questions; each says which split it is of."""
        return [
            replace(question, split=split)
            for split, name in HELD_OUT.items()
            for question in read_questions(self.path / name)
        ]

    def check_verdict(self) -> None:
        """Raise DataError where the receipt says that the data does not hold the behaviour."""
        found = self.receipt.get("verdict") or {}
        if found.get("word") == "not":
            why = "; ".join(map(str, found.get("reasons") or ())) or f"see {RECEIPT}"
            raise DataError(
                f"{brief(self.path)} does not hold the behaviour {self.name}: {why}. Make other data (steer2edit data), or take "
                "it all the same with --despite-verdict"
            )

    @property
    def origin(self) -> dict[str, Any]:
        """Where the data came from, for plans, which are published: no text of a row or an instruction."""
        rows, verdict = self.receipt.get("rows") or {}, self.receipt.get("verdict") or {}
        known = {
            "way": (self.receipt.get("made") or {}).get("way"),
            "kept": rows.get("kept"),
            "offered": rows.get("offered"),
            "verdict": verdict.get("word"),
        }
        return {"kind": "folder", "receipt": self.digest, **{k: v for k, v in known.items() if v is not None}}


def open_data_folder(path: str | Path) -> DataFolder:
    """Read a folder's receipt and check its files. Raises DataError, which lists every problem."""
    path = Path(path)
    receipt, digest = _receipt(path)
    problems = schema_faults(receipt, _RECEIPT, RECEIPT)
    # data that were sorted by a function have no metric that others could measure
    none: tuple[MetricChoice | None, list[str]] = (None, [])
    metric = receipt.get("metric")
    choice, wrong = none if metric is None else read_metric(metric, f"{RECEIPT}.metric")
    problems += wrong or _file_problems(path, receipt)
    if problems:
        raise DataError(f"{brief(path)} cannot be used as a folder of data:\n{listing(problems, limit=20)}")
    told = receipt["behavior"].get("positive") or (receipt.get("made") or {}).get("positive")
    positive = told[0] if isinstance(told, list) and told else told
    folder = DataFolder(path, receipt["behavior"]["name"], positive or None, choice, receipt, digest)
    if shared := _shared(folder):
        raise DataError(
            f"{brief(path)} cannot be used as a folder of data: its files share prompts, and no number may rest on a prompt "
            f"that was captured or chosen by:\n{listing(shared)}"
        )
    return folder


def _receipt(path: Path) -> tuple[dict[str, Any], str]:
    file = path / RECEIPT
    if not file.is_file():
        raise DataError(
            f"{brief(path)} is a folder without {RECEIPT}: give a file of contrast data in it, or a folder that steer2edit "
            "data made"
        )
    try:
        raw = read_bytes(file, JSON_BYTES)
        receipt = parse_json(raw, unique=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {brief(file)}: {getattr(error, 'strerror', None) or error}") from None
    found = receipt.get("format") if isinstance(receipt, dict) else None
    if found != FORMAT:
        what = "names no format" if found is None else f"has the format {shown(found)}"
        raise DataError(f"{brief(file)} {what}, expected {FORMAT!r}: make the data anew (steer2edit data)")
    return receipt, hashlib.sha256(raw).hexdigest()


def _file_problems(path: Path, receipt: Mapping[str, Any]) -> list[str]:
    hashes = receipt.get("files")
    problems = []
    for name in FILES:
        if not (path / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            content = hashlib.sha256(read_bytes(path / name, _MAX_BYTES)).hexdigest()
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if isinstance(hashes, dict) and hashes.get(name) != content:
            problems.append(
                f"{name} is not what {RECEIPT} says (SHA-256 {content[:12]}…, expected {str(hashes.get(name))[:12]}…): it was "
                "changed; make the data anew, or give the files one by one (--data FILE --eval FILE)"
            )
    return problems


def _shared(folder: DataFolder) -> list[str]:
    """Prompts that are in two of the files, each with its places."""
    places: dict[str, dict[str, str]] = {}
    for example in folder.read_pairs():
        places.setdefault(prompt_digest(example.prompt), {}).setdefault(TRAIN, example.where)
    for question in folder.read_questions():
        assert question.split is not None  # read_questions says it
        places.setdefault(question.digest, {}).setdefault(HELD_OUT[question.split], question.where)
    return [" and ".join(found.values()) for found in places.values() if len(found) > 1]
