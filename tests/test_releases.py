"""The releases that the project is installed with: pyproject's bounds, and the two files of constraints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["plots"], *EXTRAS["test"])]


def pins(file: str) -> dict[str, list[Requirement]]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Requirement]] = {}
    for one in (Requirement(line) for line in lines if line and not line.startswith("#")):
        found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


def release(pin: Requirement) -> Version:
    (bound,) = pin.specifier
    assert bound.operator == "==", pin
    return Version(bound.version)


@pytest.mark.parametrize("requirement", TESTED, ids=lambda one: one.name)
def test_a_bound_is_the_release_that_was_run(requirement: Requirement) -> None:
    (lowest,) = pins("constraints-lowest.txt")[canonicalize_name(requirement.name)]
    (bound,) = requirement.specifier
    assert bound.operator == ">=" and Version(bound.version) == release(lowest)


@pytest.mark.parametrize("requirement", [*TESTED, *map(Requirement, EXTRAS["dev"][1:])], ids=lambda one: one.name)
def test_every_requirement_is_pinned_for_every_python(requirement: Requirement) -> None:
    tested = pins("constraints.txt")[canonicalize_name(requirement.name)]
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": python}
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        (pin,) = [one for one in tested if one.marker is None or one.marker.evaluate(environment)]
        assert requirement.specifier.contains(release(pin))


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_name_no_build_and_no_index(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "+" not in text and "://" not in text and "\n-" not in text


def test_the_readme_and_ci_install_the_tested_releases() -> None:
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    ours = [command for command in commands if '".[' in command]
    assert len(ours) == 2 and all(" -c constraints.txt " in command for command in ours)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ours:
        assert f'"${{constraints[@]}}"{command.partition("&&")[0].partition("constraints.txt")[2].rstrip()}' in ci
