"""A notice is said once, to whoever listens; commands write it to stderr and into their JSON."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import click
import pytest
from click.testing import CliRunner

from steer2edit import notices
from steer2edit.cli import app
from steer2edit.cli.output import print_result
from steer2edit.errors import Steer2EditError
from steer2edit.notices import collected, notice


def test_a_notice_is_collected_once_in_order() -> None:
    said: list[str] = []
    with collected(said.append) as texts:
        for text in ("one", "two", "one"):
            notice(text)
        with collected() as inner:
            notice("one")
        assert notices.notices() == ["one", "two"]
    assert texts == said == ["one", "two"]
    assert inner == ["one"]
    assert notices.notices() == []


def test_without_a_listener_it_is_a_warning_once_a_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_logged", set())
    with caplog.at_level(logging.WARNING, "steer2edit"):
        notice("slow")
        notice("slow")
    assert [record.message for record in caplog.records] == ["slow"]


def test_a_command_says_it_on_stderr_and_in_its_json() -> None:
    group = type(app.main)(name="main")

    @group.command()
    @click.option("--json", "as_json", is_flag=True)
    def work(as_json: bool) -> None:
        notice("the slow way\x1b[2J")
        notice("the slow way\x1b[2J")
        print_result({"done": 1}, as_json, lambda result: str(result))

    def run(*flags: str) -> Any:
        return CliRunner().invoke(group, ["work", *flags])

    assert run().stderr == "note: the slow way\\x1b[2J\n"
    assert run().stdout == "{'done': 1}\n"
    assert json.loads(run("--json").stdout) == {"done": 1, "notices": ["the slow way\x1b[2J"]}


OLD = """
import logging, warnings

def warn():
    warnings.warn("`past` is deprecated\\nand more", FutureWarning)
    logging.getLogger("transformers.cache").warning("`cache_params` is deprecated")
    logging.getLogger("transformers.cache").warning("the model is large")
    logging.getLogger("bitsandbytes.autograd").warning("inputs are cast")
"""
MODELING = """
def forward():
    for _ in range(3):
        warn()
"""


def test_a_librarys_warnings_are_told_at_the_end_once_each() -> None:
    group = type(app.main)(name="main")
    library: dict[str, Any] = {}
    for file, text in (("utils/old.py", OLD), ("modeling.py", MODELING)):
        exec(compile(text, f"/venv/site-packages/transformers/{file}", "exec"), library)

    @group.command()
    @click.option("--json", "as_json", is_flag=True)
    @click.option("--fail", is_flag=True)
    def work(as_json: bool, fail: bool) -> None:
        library["forward"]()
        click.echo("in the middle", err=True)
        if fail:
            raise Steer2EditError("no luck")
        print_result({"done": 1}, as_json, lambda result: str(result))

    expected = [
        "transformers: `past` is deprecated (FutureWarning)",
        "transformers: `cache_params` is deprecated",
        "bitsandbytes: inputs are cast",
    ]
    said = "".join(f"note: {text}\n" for text in expected)

    def run(*flags: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            return CliRunner().invoke(group, ["work", *flags])

    assert run().stderr == "in the middle\n" + said
    assert json.loads(run("--json").stdout) == {"done": 1, "notices": expected}
    failed = run("--fail")
    assert failed.exit_code == 2 and failed.stderr == "in the middle\n" + said + "Error: no luck\n"
