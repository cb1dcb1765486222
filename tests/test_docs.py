"""Documents: pages made from data are up to date, and the others' commands and code run as they stand."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest
from conftest import run, save_chat_model
from loopback_hub import Hub

from steer2edit import methods, targets

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_families_is_what_its_script_makes() -> None:
    made = runpy.run_path(str(DOCS / "make_families.py"))["page"]()
    assert (DOCS / "families.md").read_text(encoding="utf-8") == made, "run python docs/make_families.py"


# PEFT reads a property that transformers 5 renamed; huggingface_hub streams files in a way that its HTTP library deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.parametrize(
    "pages", [("quickstart.md", "publish.md"), ("vllm.md",), ("llama-cpp.md",), ("extending.md",)], ids=" ".join
)
def test_what_a_page_says_runs(
    hub: Hub, pages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = runpy.run_path(str(DOCS / "run.py"))
    # other programs are run by docs/run.py alone
    monkeypatch.setitem(docs["run_page"].__globals__, "_is_installed", lambda _name: False)
    save_chat_model(tmp_path / "model")
    for name in docs["MODELS"]:
        hub.publish(name, tmp_path / "model")
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for package in (methods, targets):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / package.__name__.replace(".", "/"))])

    def execute(command: str, where: Path) -> str:
        """In this process: importing transformers anew for each command would take most of the time."""
        if command == "python block.py":
            runpy.run_path(str(where / "block.py"))
            return ""
        said, pipe, piped = command.rpartition(" | ")
        stdin = shlex.split(said)[1] + "\n" if pipe else None
        words = shlex.split(piped)
        while "=" in words[0]:
            words.pop(0)
        assert words[0] == "steer2edit", command
        result = run(*words[1:], stdin=stdin)
        if result.exit_code:
            raise RuntimeError(f"$ {command}\n{result.output}")
        return str(result.stdout)

    for page in pages:
        docs["run_page"](DOCS / page, folder, execute)


def test_the_package_says_that_it_is_typed() -> None:
    assert (DOCS.parent / "steer2edit" / "py.typed").is_file()
