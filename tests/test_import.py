"""What others made comes in as it was meant: the same vectors at the same places, the same low-rank updates."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ROWS, family_config, run, save_tiny
from safetensors.torch import save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.verify import verify
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import open_checkpoint
from steer2edit.checkpoint.gguf import write_gguf
from steer2edit.data.behavior import Behavior
from steer2edit.errors import DataError
from steer2edit.files.layout import PLAN
from steer2edit.importers import read, read_vectors
from steer2edit.importers.source import Reading
from steer2edit.lowering.constant_part import constant_parts
from steer2edit.methods import component, make_plan, steering
from steer2edit.plan import EditPlan, LowRank, merge
from steer2edit.scoring.scores import Scoring

HIDDEN, LAYERS = 32, 3


@pytest.fixture
def rows() -> torch.Tensor:
    """A vector for each layer, ``[layers, hidden]``."""
    return torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))


def by_layer(vectors: Vectors) -> dict[str, list[float]]:
    return {place: vector.tolist() for place, vector in vectors.directions.items()}


def stream(rows: torch.Tensor, first: int = 0) -> dict[str, list[float]]:
    return {f"residual.{i}": row.tolist() for i, row in enumerate(rows) if i >= first}


def test_every_layout_of_one_vector_a_layer_reads_alike(tmp_path: Path, rows: torch.Tensor) -> None:
    torch.save(dict(enumerate(rows)), tmp_path / "dict.pt")
    torch.save([*rows], tmp_path / "list.pt")
    torch.save(rows, tmp_path / "array.pt")
    torch.save(
        {"steering_vectors": {str(i): row[None] for i, row in enumerate(rows)}, "model": "x"}, tmp_path / "nest.pt"
    )
    numpy.save(tmp_path / "array.npy", rows.numpy())
    numpy.savez(tmp_path / "named.npz", **{f"layer_{i}": row.numpy() for i, row in enumerate(rows)})
    save_file({f"blocks.{i}.hook_resid_post": row.clone() for i, row in enumerate(rows)}, tmp_path / "tl.safetensors")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert by_layer(read_vectors(file)) == stream(rows), file.name


def test_hidden_states_and_inputs_of_blocks_are_one_layer_further(tmp_path: Path, rows: torch.Tensor) -> None:
    torch.save(torch.cat((torch.ones(1, HIDDEN), rows)), tmp_path / "hidden.pt")
    found = read_vectors(tmp_path / "hidden.pt", Reading(offset=-1))
    assert by_layer(found) == stream(rows)
    assert found.source["left_out"] == ["0"]
    torch.save({f"blocks.{i + 1}.hook_resid_pre": row for i, row in enumerate(rows)}, tmp_path / "pre.pt")
    assert by_layer(read_vectors(tmp_path / "pre.pt")) == stream(rows)


def test_a_single_vector_goes_where_it_is_told(tmp_path: Path, rows: torch.Tensor) -> None:
    torch.save(rows[1], tmp_path / "one.pt")
    with pytest.raises(DataError, match="--layers"):
        read_vectors(tmp_path / "one.pt")
    found = read_vectors(tmp_path / "one.pt", Reading(layers=(1, 2)))
    assert by_layer(found) == {place: rows[1].tolist() for place in ("residual.1", "residual.2")}


def test_writers_outputs_are_known_by_name(tmp_path: Path, rows: torch.Tensor) -> None:
    save_file(
        {"model.layers.1.self_attn.o_proj": rows[0].clone(), "model.layers.2.mlp": rows[1].clone()},
        tmp_path / "writers.safetensors",
    )
    assert by_layer(read_vectors(tmp_path / "writers.safetensors")) == {
        "attn_out.1": rows[0].tolist(),
        "mlp_out.2": rows[1].tolist(),
    }


def test_a_control_vector_reads_as_it_was_written(tmp_path: Path, rows: torch.Tensor) -> None:
    tensors = {f"direction.{i}": row for i, row in enumerate(rows) if i}
    write_gguf(tmp_path / "x.gguf", "controlvector", tensors, {"controlvector.model_hint": "llama"})
    found = read_vectors(tmp_path / "x.gguf")
    assert by_layer(found) == stream(rows, first=1) and found.source["model"] == "llama"


@dataclass
class SteeringVector:
    """The shape of the steering-vectors library's class."""

    layer_activations: dict[int, torch.Tensor]
    layer_type: str = "decoder_block"


def test_steering_vectors_files_are_read_without_running_their_code(
    tmp_path: Path, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType("steering_vectors.steering_vector")
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    monkeypatch.setattr(SteeringVector, "__module__", module.__name__)
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
        installed.setitem(sys.modules, module.__name__, module)
        for kind in ("decoder_block", "self_attn", "mlp", "input_layernorm"):
            torch.save(SteeringVector({1: rows[1]}, kind), tmp_path / f"{kind}.pt")
    places = {
        kind: [*read_vectors(tmp_path / f"{kind}.pt").directions] for kind in ("decoder_block", "self_attn", "mlp")
    }
    assert places == {"decoder_block": ["residual.1"], "self_attn": ["attn_out.1"], "mlp": ["mlp_out.1"]}
    with pytest.raises(DataError, match="input_layernorm"):
        read_vectors(tmp_path / "input_layernorm.pt")


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", lambda p: torch.save(Malicious(), p), "more than tensors"),
        ("x.pt", lambda p: p.write_bytes(pickle.dumps([1])[:5]), "not a readable torch file|more than tensors"),
        ("x.npz", lambda p: p.write_bytes(b"PK nothing"), "not a NumPy file"),
        ("x.npy", lambda p: numpy.save(p, numpy.array([{}]), allow_pickle=True), "not a NumPy file"),
        ("x.gguf", lambda p: p.write_bytes(b"GGUF" + b"\xff" * 40), "not a readable GGUF"),
        ("x.gguf", lambda p: write_gguf(p, "llama", {"a": torch.ones(2)}, {}), "expected a control vector"),
        ("x.safetensors", lambda p: p.write_bytes(b"\xff" * 40), "not a readable safetensors"),
        ("x.safetensors", lambda p: save_file({"a.lora_A.weight": torch.ones(1, 2)}, p), "give its folder"),
        ("x.safetensors", lambda p: save_file({"layer.1.head.2": torch.ones(2)}, p), "names no single layer"),
        ("x.safetensors", lambda p: save_file({"layers.1.input_layernorm": torch.ones(2)}, p), "neither the stream"),
        ("x.pt", lambda p: torch.save({1: torch.ones(2, 3)}, p), r"1 is \[2, 3\]"),
        ("x.pt", lambda p: torch.save({1: torch.tensor([1.0, float("nan")])}, p), "NaN"),
        ("x.pt", lambda p: torch.save({1: "text", 2: 3}, p), "expected one vector"),
        ("x.pt", lambda p: torch.save(3, p), "holds int"),
        ("x.txt", lambda p: p.write_text("hello"), "not supported"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    result = run("import", tmp_path / name, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and not (tmp_path / "out.safetensors").exists()


def test_vectors_that_do_not_fit_name_every_problem(tmp_path: Path, tiny_llama: Path) -> None:
    torch.save({1: torch.ones(HIDDEN + 1), 7: torch.ones(HIDDEN)}, tmp_path / "x.pt")
    result = run("compile", tiny_llama, "--vectors", tmp_path / "x.pt", "--out", tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for said in ("residual.1 has the shape [33], expected [32]", "residual.7 is no place", "layers 0-2"):
        assert said in result.output


def directions_file(statistics: Any) -> dict[str, Any]:
    """Captured statistics laid out as Steer2Edit's own code saves them."""
    held: dict[str, Any] = {side: {"pos_mean": {}, "neg_mean": {}, "direction": {}} for side in ("pre", "post")}
    for i in range(LAYERS):
        for key, name in ((f"attn_out.{i}", "self_attn.o_proj"), (f"mlp_out.{i}", "mlp.down_proj")):
            for side, where in (("pre", "input"), ("post", "output")):
                positive, negative = (statistics.mean(key, where, label) for label in ("positive", "negative"))
                place = f"model.layers[{i}].{name}"
                held[side]["pos_mean"][place], held[side]["neg_mean"][place] = positive, negative
                held[side]["direction"][place] = positive - negative
    return held


def test_the_authors_directions_and_edit_pack_give_the_same_plan_as_a_capture(
    tmp_path: Path, scoring: Scoring, loaded: Any
) -> None:
    options = component.Options(rho_attn=0.2, rho_mlp=0.2, alpha=0.5, scale="absolute", stable=False)
    expected = make_plan(scoring, method="component", options=options)
    torch.save(directions_file(scoring.statistics), tmp_path / "dirs.pt")
    vectors = read_vectors(tmp_path / "dirs.pt")
    background = capture_statistics(loaded, scoring.checkpoint, Behavior("background", ()))
    statistics = substituted(vectors, background, scoring.checkpoint, scoring.spec)
    found = make_plan(Scoring(scoring.checkpoint, scoring.spec, statistics), method="component", options=options)
    assert [e.tensor for e in found.edits] == [e.tensor for e in expected.edits] and found.edits
    for a, b in zip(found.edits, expected.edits, strict=True):
        assert isinstance(a, LowRank) and isinstance(b, LowRank)
        assert torch.allclose(a.dense(), b.dense(), atol=1e-5)

    pack: dict[str, Any] = {"attn": {}, "mlp": {}, "meta": {"vhat_attn": {}, "vhat_mlp": {}, "alpha": 0.5}}
    for edit in expected.edits:
        assert isinstance(edit, LowRank)
        site = next(site for site in scoring.spec.sites if site.tensor == edit.tensor)
        kind = "attn" if site.heads else "mlp"
        pack["meta"][f"vhat_{kind}"][site.layer] = edit.B[:, 0]
        for j, part in enumerate(edit.A.view(site.components, -1)):
            if bool(part.any()):
                entry: dict[str, Any] = {"lambda": float(part.norm() if site.heads else part)}
                pack[kind][site.layer, j] = {**entry, "k_hat": part / part.norm()} if site.heads else entry
    torch.save(pack, tmp_path / "pack.pt")
    result = run("import", tmp_path / "pack.pt", "--model", scoring.checkpoint.path, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.output
    back = EditPlan.load(tmp_path / "p.safetensors")
    for a, b in zip(back.edits, expected.edits, strict=True):
        assert isinstance(a, LowRank) and isinstance(b, LowRank)
        assert a.tensor == b.tensor and torch.allclose(a.dense(), b.dense(), atol=1e-6)
    pack["attn"][0, 99] = {"lambda": 1.0, "k_hat": torch.ones(16)}
    pack["mlp"][9, 0] = {"lambda": 1.0}
    torch.save(pack, tmp_path / "bad.pt")
    with pytest.raises(DataError, match=r"attn \(0, 99\)(.|\n)*mlp \(9, 0\)"):
        read(tmp_path / "bad.pt").plan(scoring.checkpoint, scoring.spec)  # type: ignore[union-attr]


@pytest.mark.parametrize("to", ["lora", "gguf"])
def test_import_undoes_export(scoring: Scoring, tmp_path: Path, to: str) -> None:
    plan = make_plan(scoring, options=steering.Options(sites="both"))
    plan = merge([plan, replace(plan, edits=plan.edits[1:3])], [0.5, 0.25])
    emit(plan, scoring.checkpoint, scoring.spec, to, tmp_path / "out")
    source = tmp_path / "out" if to == "lora" else tmp_path / "out/adapter.gguf"
    back = read(source).plan(scoring.checkpoint, scoring.spec)  # type: ignore[union-attr]
    assert {e.tensor for e in back.edits} == {e.tensor for e in plan.edits}
    for edit in plan.edits:
        mine = back.edit_of(edit.tensor)
        assert isinstance(mine, LowRank) and isinstance(edit, LowRank)
        assert torch.allclose(mine.dense(), edit.dense(), rtol=0, atol=1e-6 * edit.norm)


def lora(folder: Path, targets_of: tuple[str, ...] = ("o_proj",), **changes: Any) -> Path:
    """An adapter as PEFT itself saves it, with random factors."""
    from peft import LoraConfig, get_peft_model

    from steer2edit.runtime.model import load_weights

    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": list(targets_of), "init_lora_weights": False}
    torch.manual_seed(1)
    model = get_peft_model(load_weights(folder), LoraConfig(**{**settings, **changes}, task_type="CAUSAL_LM"))
    return model  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"1.self_attn.o_proj": 4}, "alpha_pattern": {"layers.0.self_attn.o_proj": 1}},
    ],
)
def test_peft_adapters_are_the_update_that_peft_merges(
    tmp_path: Path, scoring: Scoring, changes: dict[str, Any]
) -> None:
    model: Any = lora(scoring.checkpoint.path, **changes)
    model.save_pretrained(tmp_path / "adapter")
    result = run("import", tmp_path / "adapter", "--model", scoring.checkpoint.path, "-o", tmp_path / "p.safetensors")
    assert result.exit_code == 0, result.output
    plan = EditPlan.load(tmp_path / "p.safetensors")
    assert len(plan.edits) == LAYERS
    merged = model.merge_and_unload().state_dict()
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        delta = merged[edit.tensor] - scoring.checkpoint.read(edit.tensor)
        assert torch.allclose(edit.dense(), delta, atol=1e-5)
    emit(plan.scaled(0.5), scoring.checkpoint, scoring.spec, "checkpoint", tmp_path / "half")
    assert verify(tmp_path / "half", scoring.checkpoint.path).ok


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_that_are_more_than_plain_lora_are_refused(tmp_path: Path, scoring: Scoring) -> None:
    for name, changes, said in (
        ("dora", {"use_dora": True}, "DoRA"),
        ("bias", {"bias": "all"}, "biases are replaced"),
        ("head", {"modules_to_save": ["lm_head"]}, "whole modules are replaced"),
        ("reader", {"targets_of": ("q_proj", "o_proj")}, "q_proj does not write to the residual stream"),
    ):
        lora(scoring.checkpoint.path, **changes).save_pretrained(tmp_path / name)  # type: ignore[attr-defined,arg-type]
        with pytest.raises(DataError, match=said):
            read(tmp_path / name).plan(scoring.checkpoint, scoring.spec)  # type: ignore[union-attr]
    config = tmp_path / "reader/adapter_config.json"
    sound = json.loads(config.read_text())
    config.write_text(json.dumps({**sound, "r": 5}))
    with pytest.raises(DataError, match="has the rank 2, its config says r = 5"):
        read(tmp_path / "reader")
    for strange in ({"lora_alpha": "much"}, {"rank_pattern": [1]}, {"alpha_pattern": {"(": 2}}):
        config.write_text(json.dumps({**sound, **strange}))
        with pytest.raises(DataError, match=r"are not understood|is not what it should be"):
            read(tmp_path / "reader")


def test_a_compile_from_vectors_alone_gives_a_verified_artefact(
    tmp_path: Path, tiny_llama: Path, rows: torch.Tensor
) -> None:
    torch.save(rows, tmp_path / "x.pt")
    done = run("import", tmp_path / "x.pt", "-o", tmp_path / "x.vectors.safetensors", "--model", tiny_llama)
    assert done.exit_code == 0, done.output
    (tmp_path / "text.txt").write_text(" ".join(row["positive"] for row in ROWS) * 20)
    text = ("--background", tmp_path / "text.txt", "--neutral", tmp_path / "text.txt")
    vectors = ("--vectors", tmp_path / "x.vectors.safetensors")
    made = run("compile", tiny_llama, *vectors, "--to", "lora", "--to", "gguf-vector", "--out", tmp_path / "out", *text)
    assert made.exit_code == 0, made.output
    for target in ("lora", "gguf-vector"):
        assert verify(tmp_path / "out" / target, tiny_llama).ok
    plan = EditPlan.load(tmp_path / "out/lora" / PLAN)
    assert plan.data["vectors"]["format"] == "per-layer torch file" and len(plan.edits) == LAYERS
    for edit, row in zip(plan.edits, rows, strict=True):
        assert isinstance(edit, LowRank)
        assert torch.allclose(edit.B[:, 0], row / row.norm(), atol=1e-6)
    # stage by stage it is the same plan
    stats = tmp_path / "x.stats.safetensors"
    assert run("capture", tiny_llama, "--background-only", "-o", stats, *text[:2]).exit_code == 0
    staged = run("plan", tiny_llama, "--stats", stats, *vectors, "-o", tmp_path / "p.safetensors", "--strength", 1)
    assert staged.exit_code == 0, staged.output
    again = EditPlan.load(tmp_path / "p.safetensors").scaled(plan.measured.strength)
    for mine, theirs in zip(again.edits, plan.edits, strict=True):
        assert isinstance(mine, LowRank) and isinstance(theirs, LowRank)
        assert torch.allclose(mine.dense(), theirs.dense(), atol=1e-6)


def test_a_residual_vector_goes_to_both_writers_and_reaches_the_stream_whole(
    tmp_path: Path, statistics_of: Callable[..., Any], rows: torch.Tensor
) -> None:
    # behind Gemma's norms too: what the writers push, carried through the gain, is the vector
    checkpoint = open_checkpoint(save_tiny(tmp_path / "gemma", family_config("gemma3_text")))
    spec = read_spec(checkpoint)
    vectors = Vectors({"residual.1": rows[1]})
    statistics = substituted(vectors, statistics_of(checkpoint.path), checkpoint, spec)
    for sites, writers in (("attn", 1), ("mlp", 1), ("both", 2)):
        plan = make_plan(
            Scoring(checkpoint, spec, statistics),
            options=steering.Options(sites=sites),  # type: ignore[arg-type]
        )
        pushed = constant_parts(plan, checkpoint, spec)
        assert list(pushed) == [1] and len(plan.edits) == writers
        assert torch.allclose(pushed[1], writers * rows[1], atol=0.05 * float(rows[1].norm()))


def test_a_file_of_edits_is_no_vectors_file(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "adapter").mkdir()
    result = run("import", tmp_path / "adapter", "-o", tmp_path / "x.safetensors")
    assert result.exit_code == 2 and "adapter_config.json" in result.output
    torch.save({"attn": {}, "mlp": {}, "meta": {}}, tmp_path / "pack.pt")
    result = run("compile", tiny_llama, "--vectors", tmp_path / "pack.pt", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--model MODEL" in result.output


def test_an_sae_s_rows_are_directions_of_the_stream_that_it_reads(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is an extra")
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=HIDDEN, d_sae=8))
    torch.nn.init.normal_(sae.W_dec)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    sae.save_model(tmp_path / "sae")
    found = read_vectors(tmp_path / "sae", Reading(features=(3, 5)))
    assert list(found.directions) == ["residual.1"]
    assert torch.allclose(found.directions["residual.1"], sae.W_dec[3] + sae.W_dec[5])
    for features, said in (((), "--feature"), ((8,), "has the features 0-7")):
        with pytest.raises(DataError, match=said):
            read_vectors(tmp_path / "sae", Reading(features=features))
