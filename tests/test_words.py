"""Words that people read: docstrings begin with a short sentence, and "is not a" is written out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import steer2edit

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in (Path(steer2edit.__file__).parent, ROOT / "benchmarks", ROOT / "examples")
    for path in folder.rglob("*.py")
)
LONGEST = 20
# "is no writer" for "is not a writer"; "there is no writer" and "is no longer" are plain English
CURT = re.compile(r"\b(?<!there )(is|are) no (?!longer|more|other)\w+", re.IGNORECASE)
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0]


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every text of a file, with that of f-strings put together."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_docstrings_first_sentence_is_short(path: Path) -> None:
    found = [(line, first_sentence(text)) for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))]
    long = [f"{path}:{line}: {sentence}" for line, sentence in found if len(words(sentence)) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_no_thing_in_docstrings_errors_and_helps(path: Path) -> None:
    curt = [
        f"{path}:{line}: {match[0]}"
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        for match in CURT.finditer(text)
    ]
    assert not curt, "write 'is not a': " + ", ".join(curt)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_nothing_is_no_thing_in_a_document(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not [match[0] for match in CURT.finditer(" ".join(prose.split()))]


def test_the_check_finds_what_it_is_for() -> None:
    tree = ast.parse('"""One."""\nraise ValueError(f"{name} is no writer")\n')
    assert {match[0] for _, text in texts(tree) for match in CURT.finditer(text)} == {"is no writer"}
    assert not any(CURT.search(text) for text in ("there is no writer", "it is no longer there"))
    assert first_sentence("A plan (e.g. x.plan).\n\nMore.") == "A plan (e.g."  # an abbreviation only makes it shorter
