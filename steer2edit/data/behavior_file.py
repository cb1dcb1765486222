"""Behaviours as files: one TOML each, in the package or anywhere, with its data beside it.

docs/data.md has the keys. A built-in behaviour is a file like any other, and its name is the file's.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from steer2edit.data.contrast import Example, as_chats, data_hash, read_contrast
from steer2edit.data.everyday import everyday_prompts
from steer2edit.data.measurement import DIGITS, Measurement, read_measurements
from steer2edit.data.metric_choice import MetricChoice, read_metric
from steer2edit.data.prompts import Message, Prompt, text_fault
from steer2edit.data.questions import Question, read_questions
from steer2edit.errors import DataError, brief, listing, shown
from steer2edit.files.untrusted import local, read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIX = ".toml"
FOLDER = Path(__file__).parents[1] / "behaviors"
EVERYDAY = "everyday"
"""The value of ``prompts`` that stands for the packaged prompts to write pairs from."""
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class BehaviorFile:
    """One behaviour as its file says it.

    ``positive`` and ``negative`` are instructions that make a model show it and the opposite. ``prompts`` is what pairs are
    written from: "everyday" for the packaged ones, a list of texts, or a file. ``pairs`` and ``questions`` are files of contrast
    data and of held-out questions; None where there are none. ``rubric`` tells a judge what to look for. ``measured`` holds one
    entry for each measurement, with its command.
    """

    name: str
    path: Path
    description: str
    positive: str
    negative: str
    metric: MetricChoice
    prompts: Literal["everyday"] | tuple[str, ...] | Path = "everyday"
    pairs: Path | None = None
    questions: Path | None = None
    rubric: str | None = None
    measured: tuple[Measurement, ...] = ()

    def read_pairs(self) -> list[Example]:
        """The contrast data, each text prompt as one user message. Raises DataError where the file names none."""
        if self.pairs is None:
            raise DataError(
                f"the behaviour {self.name} has no pairs: {brief(self.path)} names no file of them; make them "
                "(steer2edit data), or give --data"
            )
        return as_chats(read_contrast(self.pairs))

    @property
    def pairs_sha256(self) -> str | None:
        """The first digits of the pairs' hash, as entries of ``measured`` hold them; None without pairs."""
        return None if self.pairs is None else data_hash(self.read_pairs())[:DIGITS]

    def outdated(self, one: Measurement) -> str | None:
        """Why a measurement does not hold for the file as it is now; None where it does.

        Where the file has no pairs, they are made for each model, and nothing is said of them.
        """
        own = one.metrics[0]
        if (own.name, own.goal) != (self.metric.label, self.metric.goal):
            return f"measured by another metric ({own.name}, {own.goal} is better): measure it again"
        if self.pairs is None:
            return None
        if one.pairs_sha256 is None:
            return "the entry does not say with which pairs it was measured"
        return None if one.pairs_sha256 == self.pairs_sha256 else "measured with other pairs: measure it again"

    @property
    def origin(self) -> dict[str, Any]:
        """Where the data came from, for plans: the behaviour's file by its hash, and whether it is a built-in one."""
        kind = "built-in behaviour" if self.path.parent == FOLDER else "behaviour file"
        return {"kind": kind, "file": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def read_questions(self) -> list[Question]:
        """The held-out questions; none where the file names none."""
        return [] if self.questions is None else read_questions(self.questions)

    def read_prompts(self) -> list[Prompt]:
        """What pairs are written from, each text as one user message."""
        if isinstance(self.prompts, Path):
            return [question.prompt for question in read_questions(self.prompts)]
        if isinstance(self.prompts, tuple):
            return [(Message("user", text),) for text in self.prompts]
        return everyday_prompts("pairs")


def behavior_files() -> tuple[str, ...]:
    """Names of the built-in behaviours."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}")))


def is_behavior(source: str) -> bool:
    """Whether a text is the name of a built-in behaviour or the path of a behaviour's file."""
    return source in behavior_files() or source.lower().endswith(SUFFIX)


def builtin_questions(name: str) -> list[Question] | None:
    """The questions of the built-in behaviour that a plan or receipt names; None for any other name."""
    return open_behavior(name).read_questions() if name in behavior_files() else None


def open_behavior(name_or_path: str | Path) -> BehaviorFile:
    """A built-in behaviour by its name, or one from a TOML file. Raises DataError, which lists every problem of the file."""
    known = behavior_files()
    if str(name_or_path) in known:
        return read_behavior_file(FOLDER / f"{name_or_path}{SUFFIX}")
    path = local(name_or_path)
    if path is not None and not path.is_dir():
        return read_behavior_file(path)
    if str(name_or_path).lower().endswith(SUFFIX):
        raise DataError(f"{brief(name_or_path)} does not exist; expected a behaviour's file (docs/data.md)")
    near = difflib.get_close_matches(str(name_or_path), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise DataError(
        f"there is no built-in behaviour {shown(str(name_or_path))}; there are {', '.join(known)}; or give the path of a "
        f"behaviour's file, which ends in {SUFFIX}.{hint}"
    )


def read_behavior_file(path: Path) -> BehaviorFile:
    """The behaviour in a TOML file. Raises DataError, which lists every problem with its line or its key."""
    table = read_toml(path)
    faults = [f"{key} is not a key of a behaviour; expected {', '.join(_KEYS)}" for key in table if key not in _KEYS]
    texts = {key: _text(table, key, faults, required=key != "rubric") for key in _TEXTS}
    if texts["positive"] and texts["positive"] == texts["negative"]:
        faults.append("positive and negative are the same instruction; expected opposites")
    metric, wrong = read_metric(table.get("metric"))
    measured, unsound = read_measurements(table.get("measured", []))
    faults += [*wrong, *unsound]
    prompts = _prompts(table.get("prompts", EVERYDAY), path, faults)
    pairs, questions = (
        _file(table[key], key, path, faults) if key in table else None for key in ("pairs", "questions")
    )
    if faults:
        raise DataError(f"{brief(path)} cannot be used as a behaviour:\n{listing(faults, limit=30)}")
    assert metric is not None  # nothing is wrong with it
    return BehaviorFile(
        path.stem, path, texts["description"], texts["positive"], texts["negative"], metric, prompts, pairs, questions,
        texts["rubric"] or None, measured,
    )  # fmt: skip


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises DataError, with the line of what is not TOML."""
    try:
        return tomllib.loads(read_bytes(path, _MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        raise DataError(f"cannot read {brief(path)}: {error.strerror or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{brief(path)} is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{brief(path)} is not UTF-8 (line {line}); save it as UTF-8") from None
    except RecursionError:
        raise DataError(f"{brief(path)} nests too deeply") from None


def _text(table: Mapping[str, Any], key: str, faults: list[str], required: bool) -> str:
    if key not in table:
        if required:
            faults.append(f"{key} is missing; expected a text")
        return ""
    if fault := text_fault(key, table[key], filled=True):
        faults.append(fault)
        return ""
    return " ".join(str(table[key]).split())


def _prompts(value: object, path: Path, faults: list[str]) -> Literal["everyday"] | tuple[str, ...] | Path:
    if value == EVERYDAY:
        return "everyday"
    if isinstance(value, str):
        return _file(value, "prompts", path, faults) or "everyday"
    if not isinstance(value, list) or not value:
        faults.append(f'prompts is {shown(value)}; expected "{EVERYDAY}", a list of texts or the name of a file')
        return ()
    wrong = [text_fault(f"prompts[{at}]", one, filled=True) for at, one in enumerate(value)]
    faults += filter(None, wrong)
    return tuple(map(str, value))


def _file(value: object, key: str, path: Path, faults: list[str]) -> Path | None:
    """A file beside the TOML, or below its folder."""
    if not isinstance(value, str) or not value.strip():
        faults.append(f"{key} is {shown(value)}; expected the name of a file beside {path.name}")
        return None
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).anchor or ".." in PureWindowsPath(value).parts:
        faults.append(f"{key} is {shown(value)}; expected a file in the folder of {path.name} or below it")
        return None
    file = path.parent / value
    if not file.is_file():
        faults.append(f"{key} is {shown(value)}, and there is no file {brief(file)}")
        return None
    return file


_TEXTS = ("description", "positive", "negative", "rubric")
_KEYS = (*_TEXTS, "metric", "prompts", "pairs", "questions", "measured")
