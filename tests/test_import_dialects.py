"""Files as other tools number and name them, kinds of tensors that are not arrays, and small files of great cost."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import run
from safetensors.torch import save_file

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.errors import DataError
from steer2edit.importers import ORDER, importers, read, read_vectors, supported
from steer2edit.importers.source import Reading
from steer2edit.plan import LowRank

HIDDEN, LAYERS = 32, 3


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return open_checkpoint(tiny_llama)


def vectors(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(0))


def test_every_importer_is_in_the_order_and_describes_itself() -> None:
    import steer2edit.importers as package

    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {
        "__init__",
        "source",
        "parse",
        "difference",
    }
    assert files == set(ORDER)
    assert all(importer.description in supported() for importer in importers())


# Numbering


def test_a_single_vector_goes_to_the_edited_layers(tiny_llama: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    torch.save(vectors(1)[0], tmp_path / "direction.pt")
    save_file({"vector": vectors(1)[0].clone()}, tmp_path / "single.safetensors")
    for name in ("direction.pt", "single.safetensors"):
        found = read_vectors(tmp_path / name, Reading(edited=(1, 2)))
        assert [*found.directions] == ["residual.1", "residual.2"]
    (tmp_path / "neutral.txt").write_text("the old cat sees a small bird and the river runs . " * 8)
    result = run(
        "compile", tiny_llama, "--vectors", tmp_path / "direction.pt", "--layers", "1", "--strength", "1", "--no-report",
        "--neutral", tmp_path / "neutral.txt", "--to", "lora", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    # vectors with layers of their own keep them
    torch.save(dict(enumerate(vectors(3))), tmp_path / "three.pt")
    assert len(read_vectors(tmp_path / "three.pt", Reading(edited=(1, 1))).directions) == 3
    save_file({"layers.2": vectors(1)[0].clone()}, tmp_path / "named.safetensors")
    assert [*read_vectors(tmp_path / "named.safetensors", Reading(edited=(1, 1))).directions] == ["residual.2"]


@pytest.mark.parametrize(("held", "said"), [(vectors(4), "hidden_states"), (dict(enumerate(vectors(3), 1)), "from 1")])
def test_vectors_numbered_otherwise_are_told_how_to_be_read(
    tmp_path: Path, checkpoint: Checkpoint, held: Any, said: str
) -> None:
    torch.save(held, tmp_path / "x.pt")
    spec = read_spec(checkpoint)
    with pytest.raises(DataError, match=rf"vectors for 3 layers, numbered .*{said}(.|\n)*--offset -1"):
        read_vectors(tmp_path / "x.pt").check(spec)
    # the advice works
    found = read_vectors(tmp_path / "x.pt", Reading(offset=-1))
    found.check(spec)
    assert torch.equal(found.directions["residual.0"], held[1])


def test_refusal_directions_of_llm_abliteration(tmp_path: Path, checkpoint: Checkpoint) -> None:
    rows = vectors(4)
    held: dict[str, Any] = {"layers": 4}
    for i, row in enumerate(rows):
        held |= {f"harmful_{i}": row + 1, f"harmless_{i}": torch.ones(HIDDEN), f"refuse_{i}": row}
    torch.save(held, tmp_path / "measured.refuse")
    for offset in (0, -1):
        found = read_vectors(tmp_path / "measured.refuse", Reading(offset=offset))
        found.check(read_spec(checkpoint))
        assert {place: row.tolist() for place, row in found.directions.items()} == {
            f"residual.{i - 1}": rows[i].tolist() for i in (1, 2, 3)
        }


# Kinds of tensors, and their cost


def deflated(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        header = numpy.lib.format.header_data_from_array_1_0(numpy.zeros(1, "<f4"))
        numpy.lib.format.write_array_header_1_0(file, {**header, "shape": (5 << 26,)})
        for _ in range(5 << 4):
            file.write(bytes(16 << 20))


def claiming(path: Path) -> None:
    with path.open("wb") as file:
        header = numpy.lib.format.header_data_from_array_1_0(numpy.zeros(1, "<f4"))
        numpy.lib.format.write_array_header_1_0(file, {**header, "shape": (1 << 40,)})


KINDS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "expanded": ("x.pt", lambda p: torch.save({1: torch.ones(1).expand(10**9)}, p), "expanded"),
    "expanded without end": ("x.pt", lambda p: torch.save(torch.ones(1, 1).expand(10**6, 10**6), p), "expanded"),
    "sparse": ("x.pt", lambda p: torch.save({1: torch.ones(4, 4).to_sparse()}, p), "sparse"),
    "compressed rows": ("x.pt", lambda p: torch.save({1: torch.eye(4).to_sparse_csr()}, p), "sparse"),
    "quantised": (
        "x.pt",
        lambda p: torch.save({1: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, p),
        "quantised|not a readable torch file|more than tensors",
    ),
    "without data": ("x.pt", lambda p: torch.save({1: torch.ones(4, device="meta")}, p), "without data"),
    "complex": ("x.pt", lambda p: torch.save({1: torch.ones(4, dtype=torch.complex64)}, p), "complex"),
    "truth values": ("x.pt", lambda p: torch.save({1: torch.ones(4, dtype=torch.bool)}, p), "truth"),
    "a layer of 5000 digits": ("x.pt", lambda p: torch.save({"1" * 5000: torch.ones(4)}, p), "names no single layer"),
    "a layer in other digits": ("x.pt", lambda p: torch.save({"layer ²": torch.ones(4)}, p), "names no single layer"),
    "a list in itself": ("x.pt", lambda p: torch.save(nested(200), p), "too deeply"),
    "an archive that unpacks to 1.3 GB": ("x.npz", deflated, "more than 1.1 GB"),
    "an array that claims 4 TB": ("x.npy", claiming, "not a NumPy file|memory"),
    "texts": ("x.npy", lambda p: numpy.save(p, numpy.array(["a"])), "not a NumPy file"),
}


def nested(depth: int) -> Any:
    return [torch.ones(1)] if depth == 0 else [nested(depth - 1)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize.*:DeprecationWarning", "ignore:.*quantize.*:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_tensors_are_refused_with_their_name(kind: str, tmp_path: Path) -> None:
    name, write, message = KINDS[kind]
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 8_000_000
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 5000, "y" * 300 + ".pt", "a\0b.pt"])
def test_names_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(DataError) as caught:
        read(name)
    assert len(str(caught.value)) < 1000


# PEFT's dialects


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(form: str, module: str = "model.layers.1.self_attn.o_proj") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"A": (2, 64), "B": (HIDDEN, 2)}
    return {form.format(module, side): torch.randn(shapes[side], generator=generator) for side in shapes}


FORMS = {
    "peft": "base_model.model.{}.lora_{}.weight",
    "no prefix": "{}.lora_{}.weight",
    "default in the keys": "base_model.model.{}.lora_{}.default.weight",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "module",
    [
        *("model.layers.1.self_attn.o_proj", "model.language_model.layers.1.self_attn.o_proj"),
        *("language_model.model.layers.1.self_attn.o_proj", "model.text_model.layers.1.self_attn.o_proj"),
    ],
)
def test_names_of_other_wrappers_and_trainers_are_the_same_edit(
    tmp_path: Path, checkpoint: Checkpoint, form: str, module: str
) -> None:
    tensors = factors(FORMS[form], module)
    found = read(adapter(tmp_path / "adapter", tensors, another={"x": 1}))
    (edit,) = found.plan(checkpoint, read_spec(checkpoint)).edits  # type: ignore[union-attr]
    A, B = tensors.values()
    assert isinstance(edit, LowRank) and edit.tensor == "model.layers.1.self_attn.o_proj.weight"
    assert torch.allclose(edit.dense(), 2 * B @ A)


def test_one_matrix_under_two_names_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    names = ("model.layers.1.self_attn.o_proj", "model.language_model.layers.1.self_attn.o_proj")
    tensors = {name: value for module in names for name, value in factors(FORMS["peft"], module).items()}
    with pytest.raises(DataError, match="under two names"):
        read(adapter(tmp_path / "adapter", tensors)).plan(checkpoint, read_spec(checkpoint))  # type: ignore[union-attr]


@pytest.mark.parametrize("changed", [False, True])
def test_a_base_layer_saved_beside_must_be_the_base_s(tmp_path: Path, checkpoint: Checkpoint, changed: bool) -> None:
    module = "model.layers.1.self_attn.o_proj"
    weight = checkpoint.read(f"{module}.weight") + float(changed)
    tensors = {**factors(FORMS["peft"]), f"base_model.model.{module}.base_layer.weight": weight}
    found = read(adapter(tmp_path / "adapter", tensors))
    if changed:
        with pytest.raises(DataError, match="is not the base's weight"):
            found.plan(checkpoint, read_spec(checkpoint))  # type: ignore[union-attr]
    else:
        assert len(found.plan(checkpoint, read_spec(checkpoint)).edits) == 1  # type: ignore[union-attr]


def test_an_adapter_in_a_pickle_and_one_in_a_folder_further_are_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "outer" / "behavior", factors(FORMS["peft"]))
    with pytest.raises(DataError, match="behavior is an adapter's folder"):
        read(tmp_path / "outer")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(factors(FORMS["peft"]), folder / "adapter_model.bin")
    with pytest.raises(DataError, match="a pickle, which is not read"):
        read(folder)


def test_layers_that_are_repeated_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", factors(FORMS["peft"]), layer_replication=[[0, 3]] * 100_000)
    with pytest.raises(DataError, match="layers are repeated"):
        read(folder)
