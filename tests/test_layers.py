"""The order of the rooms: a file imports only from rooms below its own, and no two files import each other.

Lazy imports and those for type checkers count. ``steer2edit/__init__.py`` is exempt: it imports every room by name, on use.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import steer2edit

PACKAGE = Path(steer2edit.__file__).parent

LAYERS = (
    ("cli",), ("demo", "compiler", "publish"), ("compose", "dry_run"), ("report",), ("search",), ("evaluation",), ("artefact",),
    ("experts", "importers", "diff"), ("targets",), ("lowering",), ("methods",), ("scoring",), ("strength",), ("pairs",),
    ("capture",), ("engines",), ("runtime",), ("data",), ("plan",), ("architecture",), ("checkpoint",), ("files",),
    ("formatting",), ("bootstrap",), ("errors", "notices", "options", "progress"),
)  # fmt: skip
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
LOWEST_WITH_TRANSFORMERS = LEVEL["runtime"]
FACE = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
FILES = sorted(set(PACKAGE.rglob("*.py")) - FACE)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    ours = [(module.split("."), name) for module, name in imports(path) if module.split(".")[0] == "steer2edit"]
    return {parts[1] if len(parts) > 1 else name for parts, name in ours} - {"__version__"}


def imported_files(path: Path) -> set[Path]:
    found = set()
    for module, name in imports(path):
        if module.split(".")[0] != "steer2edit":
            continue
        place = PACKAGE.joinpath(*module.split(".")[1:])
        candidates = (
            place / f"{name}.py",
            place / name / "__init__.py",
            place.with_suffix(".py"),
            place / "__init__.py",
        )
        found.add(next(candidate for candidate in candidates if candidate.is_file()))
    return found - FACE - {path}


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} == set(LEVEL)


def test_imports_run_down() -> None:
    problems = [
        f"{path.relative_to(PACKAGE)} imports {name}, which is not below {room(path)}"
        for path in FILES
        for name in sorted(imported_rooms(path))
        if name != room(path) and LEVEL[name] <= LEVEL[room(path)]
    ]
    assert not problems, "\n".join(problems)


def test_no_two_files_import_each_other() -> None:
    try:
        TopologicalSorter({path: imported_files(path) for path in FILES}).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(str(path.relative_to(PACKAGE)) for path in error.args[1])) from None


def test_methods_and_targets_do_not_know_each_other() -> None:
    for name in ("methods", "targets"):
        for path in (PACKAGE / name).glob("[a-z]*.py"):
            others = {one for one in imported_files(path) if one.parent == path.parent and not one.name.startswith("_")}
            assert not others, f"{path.name} imports {', '.join(one.name for one in others)}"


def test_transformers_is_imported_only_from_the_runtime_up() -> None:
    for path in FILES:
        if any(module.split(".")[0] == "transformers" for module, _ in imports(path)):
            assert LEVEL[room(path)] <= LOWEST_WITH_TRANSFORMERS, path


def test_the_root_holds_a_dozen_files_at_most() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_the_documents_show_the_order_of_the_rooms() -> None:
    order = [" ".join(f"`{name}`" for name in layer) for layer in LAYERS]
    docs = PACKAGE.parent
    table = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \|", (docs / "docs" / "how-it-works.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [row.replace(",", "") for row in table] == order
    paragraph = re.search(
        r"^`cli` →.*?\n\n", (docs / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert paragraph is not None
    assert [" ".join(part.replace(",", "").split()) for part in paragraph[0].split("→")] == order
