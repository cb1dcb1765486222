"""Write constraints.txt: the newest releases that the package, its tests and the checks install today.

Give the Python interpreters that are supported, oldest first, each with a pip of its own:
``python .ci/pin.py python3.10 python3.11 python3.13 > constraints.txt``. Run the whole suite before committing the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTORCH = "torch==2.13.0"
"""The build for CPUs and those for GPUs answer to this version; what only a GPU build installs is not pinned."""
OF_A_BUILD = ("nvidia-", "cuda-", "triton")
HEADER = """\
# The releases that the test suite was run with. Use: pip install -c constraints.txt ".[plots]"
# Written by .ci/pin.py; constraints-lowest.txt has the lowest releases that the suite was run with.
"""


def resolved(python: str) -> tuple[str, dict[str, str]]:
    """An interpreter's version, such as 3.11, and the release of every package that it would install."""
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command = [python, "-m", "pip", "install", *options, PYTORCH, f"{ROOT}[plots,test,dev,train]"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    packages = (item["metadata"] for item in report["install"])
    releases = {one["name"].lower().replace("_", "-"): one["version"].partition("+")[0] for one in packages}
    releases.pop("steer2edit")
    version = ".".join(report["environment"]["python_version"].split(".")[:2])
    return version, {name: release for name, release in releases.items() if not name.startswith(OF_A_BUILD)}


def merged(found: list[tuple[str, dict[str, str]]]) -> list[str]:
    """One line for each release of each package; with a marker where the interpreters do not all install it."""
    lines = []
    for name in sorted({name for _, releases in found for name in releases}):
        chosen = [releases.get(name) for _, releases in found]
        start = 0
        while start < len(found):
            end = start
            while end < len(found) and chosen[end] == chosen[start]:
                end += 1
            bounds = [f'python_version >= "{found[start][0]}"'] if start else []
            bounds += [f'python_version < "{found[end][0]}"'] if end < len(found) else []
            if chosen[start] is not None:
                lines.append(f"{name}=={chosen[start]}" + (f" ; {' and '.join(bounds)}" if bounds else ""))
            start = end
    return lines


if __name__ == "__main__":
    print(HEADER + "\n".join(merged([resolved(python) for python in sys.argv[1:]])))
