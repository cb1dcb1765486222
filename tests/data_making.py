"""Requests for data, and the folders that they give, with an engine that needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_engine import NOUNS, FakeEngine

from steer2edit.data.data_folder import RECEIPT
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import Message
from steer2edit.data.questions import Question
from steer2edit.pairs.folder import FILES
from steer2edit.pairs.make import DataRequest, Engines, Made, make_data
from steer2edit.pairs.telling import Instructions
from steer2edit.pairs.ways import Opposites

PROMPTS = [f"what is the {a} of the {b}" for a in NOUNS[:8] for b in NOUNS[8:14]]
BRIEF = Opposites(Instructions(("Answer briefly.",), ("Answer at length.",)))


def questions(count: int = 40) -> list[Question]:
    return [Question((Message("user", text),), f"row {i}") for i, text in enumerate(PROMPTS[:count])]


def request(out: Path, **more: Any) -> DataRequest:
    settings: dict[str, Any] = {"way": BRIEF, "metric": MetricChoice("length", "less"), "batch": 8}
    return DataRequest(out, "brief", "in few words", questions(), **{**settings, **more})


def make(out: Path, engine: FakeEngine | None = None, loaded: Any = None, **more: Any) -> Made:
    engine = engine or FakeEngine()
    return make_data(request(out, **more), Engines(engine, engine, loaded))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES.values(), RECEIPT)}
