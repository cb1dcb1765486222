"""Folders of data for tests, as ``steer2edit data`` writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from conftest import ROWS

from steer2edit.data.data_folder import FILES, FORMAT, HELD_OUT, RECEIPT, TRAIN

QUESTIONS = {
    part: [
        {"prompt": f"{row['prompt']} {word}", "positive": row["positive"], "negative": row["negative"]}
        for row in ROWS[:4]
        for word in words
    ]
    for part, words in {"select": ("now", "here"), "report": ("one", "two")}.items()
}
DESCRIBED: dict[str, Any] = {
    "behavior": {"name": "here", "description": "says where it is"},
    "metric": {"name": "count", "goal": "more", "pattern": "e", "title": "letters"},
    "made": {"way": "instructions", "positive": ["Say where.", "Say the place."], "negative": ["Say nothing.", "No."]},
    "rows": {"offered": 20, "kept": 18, "left_out": {"empty": 2}},
    "verdict": {"word": "steerable", "reasons": []},
}


def write_data_folder(path: Path, **changed: Any) -> Path:
    """A folder with the rows of the tests; a keyword changes an entry of the receipt, or a part's rows."""
    rows = {TRAIN: ROWS, **{HELD_OUT[part]: found for part, found in QUESTIONS.items()}}  # type: ignore[index]
    rows |= {f"{part}.jsonl": changed.pop(part) for part in ("train", "select", "report") if part in changed}
    path.mkdir(parents=True)
    hashes = {}
    for name in FILES:
        text = "".join(json.dumps(row) + "\n" for row in rows[name])
        (path / name).write_text(text)
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    content = {"format": FORMAT, **DESCRIBED, "files": hashes, **changed}
    (path / RECEIPT).write_text(json.dumps(content))
    return path
