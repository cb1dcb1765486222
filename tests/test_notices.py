"""A notice is said once, to whoever listens; commands write it to stderr and into their JSON."""

from __future__ import annotations

import json
import logging
from typing import Any

import click
import pytest
from click.testing import CliRunner

from steer2edit import notices
from steer2edit.cli import app
from steer2edit.cli.output import print_result
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
