"""What others made comes in as it was meant: the same vectors at the same places, the same low-rank updates."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ROWS, run, save_tiny
from family_configs import family_config
from safetensors.torch import save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.verify import verify
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import open_checkpoint
from steer2edit.checkpoint.gguf import write_gguf
from steer2edit.errors import DataError
from steer2edit.files.layout import PLAN
from steer2edit.importers import read, read_vectors
from steer2edit.importers.source import Reading
from steer2edit.lowering.constant_part import constant_parts
from steer2edit.methods import make_plan, steering
from steer2edit.plan import EditPlan, LowRank
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
        ("x.safetensors", lambda p: p.write_bytes(b"\xff" * 40), "not a safetensors file"),
        ("x.safetensors", lambda p: p.write_text('{"rows": []}'), "not a safetensors file"),
        ("x.safetensors", lambda p: p.write_bytes(b"\x40" + bytes(7) + b"{"), "not a readable safetensors"),
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
    for said in ("residual.1 has the shape [33], expected [32]", "residual.7 is not a place", "layers 0-2"):
        assert said in result.output


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
