"""Flags: one given twice is used twice or refused; data from several sources; help by headings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import ROWS, llama_config, make_tokenizer, run, save_tiny

from steer2edit.capture.statistics import Statistics
from steer2edit.cli.app import main
from steer2edit.cli.command import Command
from steer2edit.cli.flags import Flag


def commands(group: click.Group = main, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            assert isinstance(command, Command), name
            yield (*prefix, name), command


def flags(command: Command) -> list[Flag]:
    return [param for param in command.get_params(click.Context(command)) if isinstance(param, Flag)]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for path, rows in zip(paths, (ROWS[:5], ROWS[5:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_every_flag_that_takes_one_value_is_refused_twice(words: tuple[str, ...]) -> None:
    command = dict(commands())[words]
    arguments = ["x"] * sum(isinstance(param, click.Argument) and param.nargs == 1 for param in command.params)
    single = [flag for flag in flags(command) if not flag.multiple and not flag.is_flag]
    required = [part for flag in flags(command) if flag.required for part in (flag.opts[-1], "1")]
    for flag in single:
        value = flag.type.choices[0] if isinstance(flag.type, click.Choice) else "1"
        given = [] if flag.required else [flag.opts[-1], value]
        result = run(*words, *arguments, *required, *given, flag.opts[-1], value)
        assert result.exit_code == 2, result.output
        assert f"{flag.opts[-1]} is given 2 times" in " ".join(result.stderr.split())


def test_several_data_files_are_all_used(tiny_llama: Path, sources: tuple[Path, Path], tmp_path: Path) -> None:
    whole, out, joined = tmp_path / "ab.jsonl", tmp_path / "one.stats.safetensors", tmp_path / "two.stats.safetensors"
    whole.write_text("".join(path.read_text() for path in sources))
    assert run("capture", tiny_llama, "--data", whole, "-o", out).exit_code == 0
    twice = run("capture", tiny_llama, "--data", sources[0], "--data", sources[1], "-o", joined)
    assert twice.exit_code == 0, twice.output
    one, two = Statistics.load(out), Statistics.load(joined)
    assert two.source["name"] == "a + b"
    assert two.source["data"] == one.source["data"] and dict(two.examples) == dict(one.examples)
    assert float((one.difference("residual.0") - two.difference("residual.0")).abs().max()) < 1e-9
    same = run("capture", tiny_llama, "--data", whole, "--data", whole, "-o", tmp_path / "x")
    assert same.exit_code == 2 and "same source twice" in same.stderr
    both = run("capture", tiny_llama, "--behavior", "concise", "--data", whole, "-o", tmp_path / "x")
    assert both.exit_code == 2 and "exactly one of" in both.stderr


def test_limit_takes_some_rows_and_says_so(tiny_llama: Path, sources: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = ("--data", sources[0], "--data", sources[1]), tmp_path / "x.stats.safetensors"
    result = run("capture", tiny_llama, *data, "--limit", "4", "-o", out)
    assert result.exit_code == 0, result.output
    assert dict(Statistics.load(out).examples)["positive"] == 4
    assert "4 of 8 rows are used" in result.stderr
    digest = Statistics.load(out).source["data"]
    assert run("capture", tiny_llama, *data, "--limit", "4", "-o", out).exit_code == 0
    assert Statistics.load(out).source["data"] == digest


def test_the_token_limit_is_raised_by_its_flag(tiny_llama: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "long.jsonl", tmp_path / "x.stats.safetensors"
    long = [{**row, "prompt": row["prompt"] * 8} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in long))
    refused = run("capture", tiny_llama, "--data", data, "--max-tokens", "16", "-o", out)
    assert refused.exit_code == 2 and "the limit is 16" in refused.stderr
    assert run("capture", tiny_llama, "--data", data, "--max-tokens", "64", "-o", out).exit_code == 0


def test_template_arguments_reach_the_template(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "chat", llama_config(num_hidden_layers=1))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% if old %}old old old old{% endif %}{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> "
        "{% endfor %}Assistant :"
    )
    tokenizer.save_pretrained(folder)
    stats = []
    for name, more in (("plain", ()), ("old", ("--chat-template-kwargs", "old=true"))):
        out = tmp_path / f"{name}.stats.safetensors"
        result = run("capture", folder, "--data", sources[0], *more, "-o", out)
        assert result.exit_code == 0, result.output
        stats.append(Statistics.load(out))
    assert "chat_template_kwargs" not in stats[0].source
    assert stats[1].source["chat_template_kwargs"] == {"old": True}
    assert float((stats[0].difference("residual.0") - stats[1].difference("residual.0")).abs().max()) > 0
    for wrong in ("old", "=1", "a b=1"):
        refused = run("capture", folder, "--data", sources[0], "--chat-template-kwargs", wrong, "-o", tmp_path / "x")
        assert refused.exit_code == 2 and "NAME=VALUE" in refused.stderr
    twice = ("--chat-template-kwargs", "old=true", "--chat-template-kwargs", "old=false")
    assert run("capture", folder, "--data", sources[0], *twice, "-o", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_help_is_grouped_and_complete(words: tuple[str, ...]) -> None:
    text = run(*words, "--help").stdout
    assert all(flag.opts[-1] in text for flag in flags(dict(commands())[words]))
    for flag in flags(dict(commands())[words]):
        assert flag.help and (flag.help[0].isupper() or flag.help[0] == "("), flag.opts


@pytest.mark.parametrize("command", ["compile", "eval", "tune"])
def test_rarely_needed_flags_come_last(command: str) -> None:
    text = run(command, "--help").stdout
    headings = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    flags_end = headings.index("Rarely needed")
    assert headings[0] == "Data" and {"Model", "Output"} <= set(headings[:flags_end])
    assert set(headings[flags_end + 1 :]) <= {"Methods", "Targets"}
