"""A gated vector's nearest weights: the regression is the dense one, its error is held out, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROWS, llama_config, run, save_tiny
from family_configs import family_config

from steer2edit.architecture import read_spec
from steer2edit.capture.gate import RIDGES, Gate, fit_gate, part_of
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, PlanError
from steer2edit.plan import EditPlan, LowRank
from steer2edit.runtime.model import LoadedModel, load_model


@pytest.fixture(scope="module")
def texts() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    return [
        Encoded(tuple(torch.randint(4, 70, (9 + i % 5,), generator=generator).tolist()), 1 + i % 3, "background", i)
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def gate(loaded: LoadedModel) -> Gate:
    return Gate(torch.randn(32, generator=torch.Generator().manual_seed(1)), 0, 0.05)


def read(loaded: LoadedModel, texts: list[Encoded], gate: Gate) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each text by itself: its part, the inputs of layer 1's attention writer, and the gates."""
    seen: list[torch.Tensor] = []
    handle = loaded.module(loaded.spec.site("attn_out.1")).register_forward_hook(lambda _m, x, _y: seen.append(x[0]))
    for one in texts:
        hidden = loaded.model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states[gate.layer + 1][0]
        span = slice(one.start - 1, len(one.ids) - 1)
        yield part_of(one), seen.pop()[0, span].double(), gate.of(hidden[span])
    handle.remove()


@pytest.mark.parametrize("kind", ["cosine", "relu"])
def test_it_is_the_dense_regression_and_its_error_is_held_out(
    loaded: LoadedModel, texts: list[Encoded], gate: Gate, kind: str
) -> None:
    gate = Gate(gate.direction, gate.layer, gate.threshold, kind)  # type: ignore[arg-type]
    fit = fit_gate(loaded, texts, loaded.spec.site("attn_out.1"), gate, batch_tokens=64)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"fit": [], "choose": [], "measure": []}
    for part, x, g in read(loaded, texts, gate):
        parts[part].append((x, g))
    assert all(parts.values()) and fit.texts == len(parts["measure"])

    def error(a: torch.Tensor, part: str) -> float:
        missed = sum(float((g - x @ a).square().mean()) for x, g in parts[part])
        return missed / sum(float(g.square().mean()) for _, g in parts[part])

    S = sum(x.T @ x / len(x) for x, _ in parts["fit"])
    right = sum(g @ x / len(x) for x, g in parts["fit"])
    assert isinstance(S, torch.Tensor) and isinstance(right, torch.Tensor)
    unit = S.diagonal().mean() * torch.eye(len(S))
    solved = {ridge: torch.linalg.solve(S + ridge * unit, right) for ridge in RIDGES}
    best = min(solved, key=lambda ridge: error(solved[ridge], "choose"))
    assert fit.ridge == best
    assert torch.allclose(fit.a.double(), solved[best], atol=1e-4)
    assert fit.error == pytest.approx(error(solved[best], "measure"), rel=1e-3)
    x, g = (torch.cat([one[i] for one in parts["measure"]]) for i in (0, 1))
    assert fit.off is not None
    assert (fit.on > fit.off) == (float((x @ solved[best])[g > 0].mean()) > float((x @ solved[best])[g == 0].mean()))
    # each text counts once: the least error of a constant, by trying
    tried = [sum(float((g - c).square().mean()) for _, g in parts["measure"]) for c in torch.linspace(0, 10, 2000)]
    energy = sum(float(g.square().mean()) for _, g in parts["measure"])
    assert fit.constant_error == pytest.approx(min(tried) / energy, rel=1e-2, abs=1e-3)
    assert fit.open == pytest.approx(sum(float((g > 0).double().mean()) for _, g in parts["measure"]) / fit.texts)
    if kind == "cosine":
        assert fit.constant_error == pytest.approx(1 - fit.open)


def test_a_gate_that_is_never_shut_is_a_constant(loaded: LoadedModel, texts: list[Encoded], gate: Gate) -> None:
    fit = fit_gate(loaded, texts, loaded.spec.site("attn_out.1"), Gate(gate.direction, 0, -1.1))
    assert fit.open == pytest.approx(1) and fit.constant_error == pytest.approx(0, abs=1e-9)
    assert fit.off is None


def test_pairs_are_never_parted() -> None:
    for row in range(20):
        parts = {part_of(Encoded((1, 2), 1, label, row)) for label in ("positive", "negative")}  # type: ignore[arg-type]
        assert len(parts) == 1
    assert {part_of(Encoded((1, 2), 1, "background", row)) for row in range(30)} == {"fit", "choose", "measure"}


def test_what_cannot_be_is_refused(loaded: LoadedModel, texts: list[Encoded], gate: Gate, tmp_path: Path) -> None:
    site = loaded.spec.site("attn_out.1")
    with pytest.raises(DataError, match="never opens"):
        fit_gate(loaded, texts, site, Gate(gate.direction, 0, 0.9999))
    with pytest.raises(PlanError, match="later layers"):
        fit_gate(loaded, texts, site, Gate(gate.direction, 1, 0.0))
    checkpoint = open_checkpoint(save_tiny(tmp_path / "gemma2", family_config("gemma2")))
    other = load_model(checkpoint, read_spec(checkpoint))
    with pytest.raises(PlanError, match="norm stands behind"):
        fit_gate(other, texts, other.spec.site("attn_out.1"), gate)


def test_the_command_writes_a_plan_that_is_emitted_and_verified(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "base", llama_config())
    data, condition = tmp_path / "rows.jsonl", tmp_path / "c.vectors.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Vectors({"residual.0": torch.randn(32, generator=torch.Generator().manual_seed(1))}).save(condition)
    out = tmp_path / "x.plan.safetensors"
    where = ["--condition-layer", 0, "--layer", 2, "-o", out]
    command = ["gate", model, "--data", data, "--condition", condition, *where]
    refused = run(*command)
    assert refused.exit_code == 2 and "give --threshold" in refused.output
    result = run(*command, "--threshold", 0.05, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    plan = EditPlan.load(out)
    assert plan.method["held_out_error"] == told["held_out_error"] > 0 and len(plan.seen) == len(ROWS)
    (edit,) = plan.edits
    assert isinstance(edit, LowRank) and edit.tensor == "model.layers.2.self_attn.o_proj.weight"
    assert told["constant_error"] == pytest.approx(1 - told["open_share"])
    assert "gate" in run("show", out).output
    assert run("emit", out, model, "--to", "lora", "--out", tmp_path / "out").exit_code == 0
    assert run("verify", tmp_path / "out", "--base", model).exit_code == 0
    absent = run(*[word if word != condition else "nope" for word in command], "--force")
    assert absent.exit_code == 2 and "--condition nope: there is no such file" in absent.output
    stats = tmp_path / "c.safetensors"  # what a file holds tells its kind, not its name
    run("capture", model, "--data", data, "-o", stats)
    both = run("gate", model, "--data", data, "--condition", stats, *where, "--force")
    assert both.exit_code == 0 and "held-out texts; a constant would miss" in both.output
    assert "The gate is open for" in both.output
    always = run(*command, "--threshold", -1.1, "--force")
    assert "and it is never shut" in always.output and EditPlan.load(out).method["when_shut"] is None
