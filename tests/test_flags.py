"""Flags: one given twice is used twice or refused; data from several sources; help by headings."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from conftest import ROWS, llama_config, make_tokenizer, run, save_tiny

from steer2edit.capture.statistics import Statistics
from steer2edit.cli.app import main
from steer2edit.cli.command import Command
from steer2edit.cli.flags import Flag
from steer2edit.plan import EditPlan


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
    assert run("capture", tiny_llama, *data, "--limit", "4", "-o", out, "--force").exit_code == 0
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
    assert all(flag.opts[-1] in text for flag in flags(dict(commands())[words]) if not flag.hidden)
    for flag in flags(dict(commands())[words]):
        assert flag.help and (flag.help[0].isupper() or flag.help[0] == "("), flag.opts


@pytest.mark.parametrize("command", ["compile", "eval", "tune"])
def test_rarely_needed_flags_come_last(command: str) -> None:
    text = run(command, "--help").stdout
    headings = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    flags_end = headings.index("Rarely needed")
    assert headings[0] == "Data" and {"Model", "Output"} <= set(headings[:flags_end])
    assert set(headings[flags_end + 1 :]) <= {"Methods", "Targets"}


def test_a_file_is_replaced_by_its_own_kind_and_only_with_force(
    tiny_llama: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    base, stats, plan = tmp_path / "base", tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    shutil.copytree(tiny_llama, base)
    shard = base / "model.safetensors"
    before = shard.read_bytes()
    both = ("--data", sources[0], "--data", sources[1])
    assert run("capture", base, *both, "-o", stats).exit_code == 0
    planned = run("plan", base, "--stats", stats, "--strength", "1", "-o", plan)
    assert planned.exit_code == 0, planned.output
    torch.save({0: torch.ones(32)}, tmp_path / "v.pt")
    writing = (
        ("capture", base, "--data", sources[0]),
        ("plan", base, "--stats", stats),
        ("scale", plan, "--by", "2"),
        ("import", tmp_path / "v.pt"),
        ("diff", base, base),
        ("report", plan),
    )
    for command in writing:
        for force in ((), ("--force",)):
            refused = run(*command, "-o", shard, *force)
            assert refused.exit_code == 2 and "it is not replaced" in refused.stderr, (command, refused.output)
    assert shard.read_bytes() == before
    again = ("plan", base, "--stats", stats, "--strength", "2", "-o", plan)
    refused = run(*again)
    assert refused.exit_code == 2 and "--force to replace it" in refused.stderr
    assert run(*again, "--force").exit_code == 0
    assert EditPlan.load(plan).measured.strength == 2


# PEFT reads a property that transformers 5 renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_commands_that_compile_prints_run_as_they_stand(
    tiny_llama: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    neutral, base = tmp_path / "neutral.txt", tmp_path / "a base"
    neutral.write_text("the old cat sees a small bird and the river runs . " * 8)
    shutil.copytree(tiny_llama, base)
    out = tmp_path / "my out"
    done = run(
        "compile", base, "--data", sources[0], "--data", sources[1], "--neutral", neutral, "--to", "lora", "--to", "checkpoint",
        "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.stdout.splitlines()]
    printed = [line for line in lines if line.startswith("steer2edit ")]
    assert [line.split()[1] for line in printed] == ["verify", "verify", "show", "chat"]
    for line in printed:
        again = run(*shlex.split(line)[1:], stdin="what is the cat ?\n")
        assert again.exit_code == 0, again.output
    code = "\n".join(line for line in lines if line.startswith(("from ", "base = ", "model = ")))
    assert code.count("model = ") == 2
    exec(compile(code, "printed", "exec"), {})
    assert "nats/token" in done.stdout and str(out / "lora") in done.stdout
    assert "{" not in done.stdout and "λ" not in done.stdout


def test_a_panic_of_a_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Libraries in Rust raise a BaseException of this name."""
    panic = type("PanicException", (BaseException,), {})

    def stop(_: object) -> None:
        raise panic("called `Option::unwrap()` on a `None` value\nmore")

    monkeypatch.setattr("steer2edit.plan.EditPlan.load", stop)
    result = run("show", tmp_path / "x.plan.safetensors")
    assert result.exit_code == 2
    assert "a library stopped at this input: called `Option::unwrap()` on a `None` value" in result.stderr
