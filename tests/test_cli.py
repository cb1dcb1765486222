"""The command line does the whole job, and answers bad input with one clear error and exit code 2."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROWS, llama_config, make_tokenizer, run, save_tiny
from safetensors.torch import load_file, save_file

from steer2edit.errors import Steer2EditError
from steer2edit.plan import Base, EditPlan
from steer2edit.strength.settle import check_not_empty


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def neutral(tmp_path: Path) -> Path:
    path = tmp_path / "neutral.txt"
    path.write_text("the old cat sees a small bird and the river runs . " * 8)
    return path


def test_compile_to_both_targets_and_verify(tiny_llama_bf16: Path, data: Path, neutral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "compile", tiny_llama_bf16, "--data", data, "--neutral", neutral, "--to", "checkpoint", "--to", "lora",
        "--out", out, "--kl-budget", "0.02", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert 0 < printed["measured"]["costs"]["prose"]["kl"] <= 0.02
    for target in ("checkpoint", "lora"):
        verified = run("verify", out / target, "--base", tiny_llama_bf16, "--json")
        assert verified.exit_code == 0, verified.output
        assert json.loads(verified.stdout)["ok"]
        assert (out / target / "README.md").read_text().startswith("---\n")


def test_the_stages_give_what_compile_gives(tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path) -> None:
    common = ("--neutral", neutral, "--strength", "0.5")
    assert run("compile", tiny_llama, "--data", data, *common, "--out", tmp_path / "one").exit_code == 0
    stats, plan = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    assert run("capture", tiny_llama, "--data", data, "-o", stats).exit_code == 0
    assert run("plan", tiny_llama, "--stats", stats, "--strength", "0.5", "-o", plan).exit_code == 0
    assert run("emit", plan, tiny_llama, "--to", "checkpoint", "-o", tmp_path / "two").exit_code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    again = run("compile", tiny_llama, "--stats", stats, *common, "--out", tmp_path / "three")
    assert again.exit_code == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "three" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "component", "--scale", "absolute", "--rho-attn", "0.3", "--rho-mlp", "0.4", "--alpha", "0.5"),
        ("--method", "component", "--top-heads", "3", "--top-neurons", "5", "--layers", "1-2"),
        ("--method", "component", "--tau-attn", "0.2", "--tau-mlp", "0.2", "--slope", "2"),
        ("--method", "steering", "--sites", "both", "--carriers", "0.5"),
        ("--method", "constant", "--layer", "2"),
        ("--method", "silence", "--components", "attn.1.h2,mlp.0.n3-5"),
        ("--method", "transport", "--layers", "1-1"),
        ("--method", "ablation", "--alpha", "0.3", "--direction-layer", "1", "--embedding"),
    ],
)
def test_every_method_compiles(
    tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = run("compile", tiny_llama, "--data", data, "--neutral", neutral, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert run("verify", tmp_path / "out", "--base", tiny_llama).exit_code == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("transport",), "full rank"), (("silence", "--components", "layer.1", "--prune"), "cannot remove layers")],
)
def test_a_plan_that_a_target_cannot_carry_is_refused_before_its_strength_is_measured(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], reason: str
) -> None:
    def measured(*arguments: object, **named: object) -> None:
        raise AssertionError("the strength is measured")

    monkeypatch.setattr("steer2edit.compiler.neutral_texts", measured)
    out = tmp_path / "out"
    targets = ("--to", "checkpoint", "--to", "lora")
    result = run("compile", tiny_llama, "--data", data, "--method", *options, *targets, "--out", out)
    assert result.exit_code == 2 and reason in result.output
    assert not out.exists() or not any(out.iterdir())


def test_an_empty_plan_is_refused_with_what_its_method_offers() -> None:
    for options, offers in (({}, False), ({"stable": True}, False), ({"stable": True, "top_heads": 0.2}, True)):
        empty = EditPlan(Base("x", None, "00"), (), method={"name": "x", **options})
        with pytest.raises(Steer2EditError, match="give more examples") as raised:
            check_not_empty(empty)
        assert ("--all-components" in str(raised.value), "--top-heads" in str(raised.value)) == (bool(options), offers)


def test_show_lists_edits_that_are_of_no_component(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    stats, out = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    assert run("capture", tiny_llama, "--data", data, "-o", stats).exit_code == 0
    options = (("constant", "--place", "writers"), ("rotation", "--layers", "0-1"), ("ablation", "--embedding"))
    for method in options:
        planned = run("plan", tiny_llama, "--stats", stats, "--method", *method, "-o", out, "--force")
        assert planned.exit_code == 0, planned.output
        assert ("--to checkpoint" in planned.output) == (method[0] == "ablation")
        edits = EditPlan.load(out).edits
        assert all(edit.tensor in run("show", out).stdout for edit in edits)
        listed = json.loads(run("show", out, "--json").stdout)["tensors"]
        assert [row["tensor"] for row in listed] == [edit.tensor for edit in edits]


def test_a_plan_that_edits_nothing_says_so(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    stats, out = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    assert run("capture", tiny_llama, "--data", data, "-o", stats).exit_code == 0
    options = ("--method", "component", "--tau-attn", "1", "--tau-mlp", "1", "--slope", "1")
    planned = run("plan", tiny_llama, "--stats", stats, *options, "-o", out, "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["edits"] == 0
    assert any("edits nothing" in text for text in json.loads(planned.stdout)["notices"])


def test_scale_absolute_is_not_rescaled(tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path) -> None:
    options = ("--method", "component", "--scale", "absolute", "--rho-attn", "0.5", "--alpha", "0.1")
    result = run(
        "compile", tiny_llama, "--data", data, "--neutral", neutral, *options, "--out", tmp_path / "out", "--json"
    )
    assert json.loads(result.stdout)["measured"]["strength"] == 1.0


def test_a_planned_strength_is_recorded_and_scale_multiplies_it(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    stats, plan, scaled = (
        tmp_path / name for name in ("x.stats.safetensors", "x.plan.safetensors", "y.plan.safetensors")
    )
    assert run("capture", tiny_llama, "--data", data, "-o", stats).exit_code == 0
    assert run("plan", tiny_llama, "--stats", stats, "--strength", "2", "-o", plan).exit_code == 0
    assert EditPlan.load(plan).measured.strength == 2
    assert run("scale", plan, "--by", "3", "-o", scaled).exit_code == 0
    assert EditPlan.load(scaled).measured.strength == 6


def test_scale_absolute_means_the_same_in_python_and_on_the_command_line(
    tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path
) -> None:
    import steer2edit
    from steer2edit.data.behavior import Behavior
    from steer2edit.methods import component

    flags = ("--method", "component", "--scale", "absolute", "--rho-attn", "0.5", "--alpha", "0.1")
    result = run(
        "compile", tiny_llama, "--data", data, "--neutral", neutral, *flags, "--to", "lora", "--out", tmp_path / "one"
    )
    assert result.exit_code == 0, result.output
    request = steer2edit.CompileRequest(
        tiny_llama, tmp_path / "two", Behavior.from_data(data), to=("lora",), neutral=neutral.read_text(),
        method="component", options=component.Options(rho_attn=0.5, alpha=0.1, scale="absolute"),
    )  # fmt: skip
    compiled = steer2edit.compile(request)
    plan = EditPlan.load(tmp_path / "one" / "steer2edit" / "plan.safetensors")
    assert plan.measured.strength == compiled.plan.measured.strength == 1.0
    assert plan.method["stable"] is compiled.plan.method["stable"] is False
    assert plan.hash == compiled.plan.hash


def test_show_lists_and_draws(tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path) -> None:
    run("compile", tiny_llama, "--data", data, "--neutral", neutral, "--out", tmp_path / "out")
    shown = run("show", tmp_path / "out", "--plot", tmp_path / "map.png")
    assert shown.exit_code == 0, shown.output
    assert "Strongest heads" in shown.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    described = json.loads(run("show", tmp_path / "out", "--json", "--top", "2").stdout)
    assert len(described["components"]["head"]) == 2
    assert described["sha256"] == EditPlan.load(tmp_path / "out" / "steer2edit" / "plan.safetensors").hash


def test_push_dry_run_lists_the_artefact_and_sends_nothing(
    tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path
) -> None:
    run("compile", tiny_llama, "--data", data, "--neutral", neutral, "--out", tmp_path / "out", "--to", "lora")
    (tmp_path / "out" / ".secret").write_text("token")
    result = run("push", tmp_path / "out", "user/name", "--dry-run", "--json")
    assert [entry["file"] for entry in json.loads(result.stdout)["files"]] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "steer2edit.json", "steer2edit/plan.safetensors",
    ]  # fmt: skip
    assert run("push", tiny_llama, "user/name", "--dry-run").exit_code == 2
    assert run("push", tmp_path / "out", "no-slash", "--dry-run").exit_code == 2


def test_a_failed_check_exits_with_1(tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path) -> None:
    run("compile", tiny_llama, "--data", data, "--neutral", neutral, "--out", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    result = run("verify", tmp_path / "out", "--base", tiny_llama, "--level", "bytes")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def broken_shard(folder: Path, change: Callable[[bytearray], bytearray]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(bytearray(path.read_bytes())))


def lying_header(raw: bytearray) -> bytearray:
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 4
    new = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "does not exist"),
    "missing config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "truncated shard": (lambda f: broken_shard(f, lambda raw: raw[:-100]), "truncated"),
    "offsets that lie": (lambda f: broken_shard(f, lying_header), "damaged header"),
    "index outside": (index_outside, "outside the folder"),
    "NaN": (with_nan, "layers.1.self_attn.o_proj.weight holds NaN"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path, kind: str) -> None:
    model = tmp_path / "broken" / "model"
    shutil.copytree(tiny_llama, model)
    spoil, message = BAD_MODELS[kind]
    spoil(model)
    result = run("compile", model, "--data", data, "--neutral", neutral, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--behavior", "concize"], "Did you mean concise"),
        (["--data", "absent.jsonl"], "does not exist"),
        ([], "exactly one of"),
        (["--data", "DATA", "--behavior", "concise"], "exactly one of"),
        (["--data", "ONE_CLASS"], "no negative example"),
        (["--data", "DATA", "--to", "gguf2"], "no target 'gguf2'"),
        (["--data", "DATA", "--method", "magic"], "no method 'magic'"),
        (["--data", "DATA", "--method", "steering", "--rho-attn", "1"], "has no option --rho-attn"),
        (["--data", "DATA", "--layers", "2-9"], "has 0-2"),
        (["--data", "DATA", "--layers", "many"], "not a range of layers"),
        (["--data", "DATA", "--kl-budget", "-1"], "positive number"),
        (["--data", "DATA", "--strength", "nan"], "--strength"),
        (["--data", "DATA", "--method", "ablation", "--alpha", "nan"], "'--alpha': nan is not a finite number"),
        (
            ["--data", "DATA", "--method", "transport", "--most-gain", "nan"],
            "'--most-gain': nan is not a finite number",
        ),
        (["--data", "DATA", "--neutral", "absent.txt"], "absent.txt"),
        (["--data", "DATA", "--device", "abacus"], "not a device"),
        (["--stats", "absent.safetensors"], "does not exist"),
        (["--stats", "absent.safetensors", "--data", "DATA"], "one of the three"),
    ],
)
def test_bad_arguments(tiny_llama: Path, data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    one_class = tmp_path / "one.jsonl"
    one_class.write_text('{"prompt": "a", "response": "b", "label": "positive"}\n')
    given = [{"DATA": str(data), "ONE_CLASS": str(one_class)}.get(word, word) for word in arguments]
    result = run("compile", tiny_llama, *given, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model(tiny_llama: Path, tiny_llama_bf16: Path, data: Path, tmp_path: Path) -> None:
    stats, plan = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    run("capture", tiny_llama, "--data", data, "-o", stats)
    run("plan", tiny_llama, "--stats", stats, "-o", plan)
    result = run("emit", plan, tiny_llama_bf16, "--to", "lora", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "only the weights it was computed from" in result.stderr
    result = run("plan", tiny_llama_bf16, "--stats", stats, "-o", tmp_path / "y")
    assert result.exit_code == 2 and "capture them from this model" in result.stderr


def test_a_model_with_a_chat_template(data: Path, neutral: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "chat", llama_config(num_hidden_layers=1))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}Assistant :"
    )
    tokenizer.save_pretrained(folder)
    result = run(
        "compile", folder, "--data", data, "--neutral", neutral, "--system", "be very old", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from steer2edit.cli.app import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "numpy"} & set(out.split())


def test_the_python_interface(tiny_llama: Path, data: Path, neutral: Path, tmp_path: Path) -> None:
    import steer2edit
    from steer2edit.data.behavior import Behavior

    request = steer2edit.CompileRequest(
        tiny_llama, tmp_path / "out", Behavior.from_data(data), neutral=neutral.read_text(), kl_budget=0.01
    )
    compiled = steer2edit.compile(request)
    assert compiled.plan.measured.kl <= 0.01
    assert steer2edit.verify(compiled.artefacts["checkpoint"], tiny_llama, numbers=False).ok
    with pytest.raises(AttributeError):
        _ = steer2edit.nothing
    with pytest.raises(steer2edit.Steer2EditError, match="exactly one of the two"):
        steer2edit.CompileRequest(tiny_llama, tmp_path / "none")
