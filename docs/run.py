"""Runs what the documents say: python docs/run.py [--models FOLDER] [PAGE …]

Every ``console`` block (its lines that begin with ``$``) and every ``python`` block of a page is run, in order, in an empty
folder. Models' names stand: a small Hub on loopback serves a tiny random model under the names in ``MODELS``, or the real
one where ``--models`` has a folder of that name. Comments on a line of their own direct the block that follows:

    <!-- needs: vllm -->      run only where this program or Python module is installed
    <!-- skip: reason -->     not run
    <!-- file: pairs.jsonl -->    the block is a file's content; ``steer2edit/…`` is a file of the package (of a copy)
    <!-- serves: URL -->      the command goes on running while the page is run; the URL answers once it is ready
    <!-- after: page.md -->   the page goes on in the folder that another page leaves
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = ("quickstart.md", "publish.md", "vllm.md", "llama-cpp.md", "import.md", "compose.md", "extending.md")
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct",)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"<!-- (needs|skip|file|serves|after): (.+?) -->")
_READY_SECONDS = 600

Execute = Callable[[str, Path], str]
"""Runs a shell command in a folder and gives what it printed. Raises RuntimeError where it fails."""


@dataclass(frozen=True)
class Block:
    """A fenced block, the line of the page that it begins on, and its directives."""

    kind: str
    text: str
    line: int
    directives: Mapping[str, str] = field(default_factory=dict)

    @property
    def commands(self) -> list[str]:
        """What is typed: lines after ``$``, with those that they continue on."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def read_page(path: Path) -> list[Block]:
    """The blocks of a page that do something, in order."""
    text = path.read_text(encoding="utf-8")
    blocks, end = [], 0
    for match in _FENCE.finditer(text):
        # a directive stands directly before its block
        before = text[end : match.start()].rsplit("\n\n", 1)[-1]
        directives = dict(_DIRECTIVE.findall(before))
        line = text.count("\n", 0, match.start()) + 1
        if match[1] in ("console", "python") or "file" in directives:
            blocks.append(Block(match[1], match[2], line, directives))
        end = match.end()
    return blocks


def files_of(path: Path) -> list[str]:
    """The files that a page writes."""
    return [block.directives["file"] for block in read_page(path) if "file" in block.directives]


def page_before(path: Path) -> Path | None:
    """The page that this one goes on from."""
    found = re.search(r"<!-- after: (\S+) -->", path.read_text(encoding="utf-8"))
    return path.parent / found[1] if found else None


def run_page(path: Path, folder: Path, execute: Execute) -> list[str]:
    """Run a page's blocks in ``folder``; what was not run, with the reason. Raises RuntimeError naming page and line."""
    left_out, servers = [], []
    try:
        for block in read_page(path):
            where = f"{path.name}:{block.line}"
            if reason := _reason_to_skip(block):
                left_out.append(f"{where}: {reason}")
                continue
            try:
                if "file" in block.directives:
                    target = folder / block.directives["file"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(block.text, encoding="utf-8")
                elif "serves" in block.directives:
                    servers.append(_serve(block.commands[0], folder, block.directives["serves"]))
                elif block.kind == "python":
                    script = folder / "block.py"
                    script.write_text(block.text, encoding="utf-8")
                    execute("python block.py", folder)
                else:
                    for command in block.commands:
                        execute(command, folder)
            except RuntimeError as error:
                raise RuntimeError(f"{where}: {error}") from None
    finally:
        for server in servers:
            server.terminate()
            server.wait(60)
    return left_out


def _reason_to_skip(block: Block) -> str:
    needed = block.directives.get("needs")
    if needed and not _is_installed(needed):
        return f"{needed} is not installed"
    return block.directives.get("skip", "")


def _is_installed(name: str) -> bool:
    return shutil.which(name) is not None or find_spec(name) is not None


def _serve(command: str, folder: Path, url: str) -> subprocess.Popen[bytes]:
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"], cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    server.kill()
    raise RuntimeError(f"{command} did not answer at {url}:\n{log.read_text(errors='replace')[-2000:]}")


def in_shell(command: str, folder: Path) -> str:
    """Run a command as a reader does."""
    paths = [str(folder), os.environ.get("PYTHONPATH", str(DOCS.parent))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"$ {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}\nexit code {done.returncode}")
    return done.stdout


def in_shell_aloud(command: str, folder: Path) -> str:
    """The same, and print what it printed."""
    said = in_shell(command, folder)
    print(f"$ {command}\n{said}", flush=True)
    return said


def main() -> None:
    sys.path.insert(0, str(DOCS.parent / "tests"))
    import loopback_hub
    from conftest import save_chat_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--models", type=Path, help="folder of real models' folders")
    parser.add_argument("--show", action="store_true", help="print what the commands print")
    given = parser.parse_args()
    pages = [DOCS / name for name in given.pages]
    with loopback_hub.serve() as hub, tempfile.TemporaryDirectory() as scratch:
        save_chat_model(Path(scratch) / "model")
        for name in MODELS:
            real = given.models / name.rsplit("/", 1)[-1] if given.models else None
            hub.publish(name, real if real is not None and real.is_dir() else Path(scratch) / "model")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            os.environ.pop(name, None)
        os.environ.update(
            HF_ENDPOINT=hub.url, HF_HOME=f"{scratch}/hf", HF_TOKEN=loopback_hub.TOKEN, HF_HUB_DISABLE_XET="1"
        )
        folders: dict[Path, Path] = {}
        for page in pages:
            _run_from_the_start(page, folders, Path(scratch), in_shell_aloud if given.show else in_shell)


def _run_from_the_start(page: Path, folders: dict[Path, Path], scratch: Path, execute: Execute) -> None:
    if page in folders:
        return
    before = page_before(page)
    if before is not None:
        _run_from_the_start(before, folders, scratch, execute)
    folders[page] = folders[before] if before is not None else Path(tempfile.mkdtemp(dir=scratch))
    if any(name.startswith("steer2edit/") for name in files_of(page)):
        shutil.copytree(DOCS.parent / "steer2edit", folders[page] / "steer2edit", dirs_exist_ok=True)
    began = time.monotonic()
    left_out = run_page(page, folders[page], execute)
    count = sum(len(block.commands) or 1 for block in read_page(page)) - len(left_out)
    print(f"{page.name}: {count} commands and blocks in {time.monotonic() - began:.0f} s", flush=True)
    for reason in left_out:
        print(f"  not run  {reason}", flush=True)


if __name__ == "__main__":
    main()
