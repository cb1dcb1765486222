"""Documents: pages made from data are up to date, and the others' commands and code run as they stand."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
from conftest import run, save_chat_model
from loopback_hub import Hub

from steer2edit import methods, targets
from steer2edit.cli.app import main

DOCS = Path(__file__).parents[1] / "docs"


GENERATE = runpy.run_path(str(DOCS / "generate.py"))


def test_generated_blocks_are_what_the_code_gives() -> None:
    stale = [path.name for path, text in GENERATE["pages"]().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run python docs/generate.py: {', '.join(stale)}"


def test_every_block_stands_in_one_page_and_every_mark_is_a_block() -> None:
    texts = [path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")]
    names = [name for text in texts for name in GENERATE["block_names"](text)]
    assert sorted(names) == sorted(GENERATE["BLOCKS"])
    assert sum(text.count("<!-- made by") + text.count("<!-- end of") for text in texts) == 2 * len(names)


# PEFT reads a property that transformers 5 renamed; huggingface_hub streams files in a way that its HTTP library deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.parametrize(
    "pages",
    [("quickstart.md", "publish.md"), ("vllm.md",), ("llama-cpp.md",), ("import.md", "compose.md"), ("extending.md",)],
    ids=" ".join,
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


def written_commands() -> list[tuple[str, str]]:
    """Every steer2edit command in a block of README and documents, with its file."""
    found = []
    for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        for block in re.findall(r"^```.*?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"(?:\$ )?(?:.*(?:&&|\|) )?(steer2edit .+)", line):
                    found.append((page.name, match[1]))
    return found


def test_every_command_that_is_written_down_exists_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a method that a page writes has options of its own
    for block in runpy.run_path(str(DOCS / "run.py"))["read_page"](DOCS / "extending.md"):
        name = Path(block.directives.get("file", ""))
        if name.parent.name == "methods":
            (tmp_path / name.name).write_text(block.text, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    commands = written_commands()
    assert len(commands) > 40
    problems = []
    for page, line in commands:
        words = shlex.split(line, comments=True)[1:]
        command: click.Command = main
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        params = command.get_params(click.Context(command))
        known = {name for parameter in params for name in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"-h", "--help", "--version"}
        if isinstance(command, click.Group) and not set(words) <= known:
            problems.append(f"{page}: {line}: no such command")
        unknown = [word for word in words if re.match(r"--?[a-zA-Z]", word) and word.split("=")[0] not in known]
        problems += [f"{page}: {line}: no option {word}" for word in unknown]
    assert not problems, "\n".join(problems)


def test_every_command_in_a_sentence_exists() -> None:
    pages = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
    written = [
        (page.name, name) for page in pages for name in re.findall(r"`steer2edit ([a-z]+)", page.read_text("utf-8"))
    ]
    assert len(written) > 20
    assert not [(page, name) for page, name in written if name not in main.commands]


def test_links_between_documents_lead_somewhere() -> None:
    pages = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 20
    assert not [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()]


def test_every_document_is_in_the_list_of_documents() -> None:
    listed = (DOCS / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in listed]
