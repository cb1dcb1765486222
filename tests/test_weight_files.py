"""Which files of a folder are the model's weights, and what is said where they contradict each other."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TENSORS, refusal, set_index, write
from conftest import llama_config, run, save_tiny
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import INDEX, SINGLE, open_checkpoint
from steer2edit.notices import collected
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.runtime.model import load_weights


def test_every_damaged_shard_is_told_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 3)
    first, second, third = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    message = refusal(folder)
    assert first.name in message and second.name in message and third.name not in message


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(shard for shard in index.values() if shard != index["norm"])
    set_index(folder, {**index, "norm": other, "ghost": other})
    message = refusal(folder)
    assert "'norm'" in message and "'ghost'" in message and other in message


def test_an_index_that_drops_what_its_shards_hold_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    set_index(folder, {name: shard for name, shard in index.items() if name not in ("norm", "layer.1.weight")})
    message = refusal(folder)
    assert "does not name 'norm'" in message and "does not name 'layer.1.weight'" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    message = refusal(folder)
    assert all(repr(name) in message for name in load_file(first))
    assert f"in two shards, {first.name} and {second.name}" in message


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "./model.safetensors",
        "",
        ".",
        "..",
        None,
        3,
        ["a"],
        {"a": 1},
    ],
)
def test_an_index_names_plain_files_only(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    folder = write(tmp_path / "m", TENSORS, 2)
    set_index(folder, {"norm": shard})
    assert "outside the folder" in refusal(folder)


@pytest.mark.parametrize("shard", ["gone.safetensors", "a\0b", "x" * 5000, "folder"])
def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, shard: str) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    (folder / "folder").mkdir()
    set_index(folder, {"norm": shard})
    assert "cannot read" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3, [["norm", SINGLE]]])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    set_index(folder, weight_map)
    assert "has no weight_map" in refusal(folder)


def test_a_config_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)
    (folder / "config.json").mkdir()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("pytorch_model.bin", "found pytorch_model.bin"),
        ("model.gguf", "found model.gguf"),
        ("consolidated.00.pth", "found consolidated.00.pth"),
        ("consolidated.safetensors", "found consolidated.safetensors"),
        ("weights.safetensors", "rename it to model.safetensors"),
        ("adapter_config.json", "PEFT adapter"),
        ("readme.txt", "neither model.safetensors nor"),
    ],
)
def test_folders_without_safetensors_say_what_they_hold(tmp_path: Path, found: str, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / found).write_text("")
    assert said in refusal(tmp_path)


def two_sets(folder: Path, shards: int = 2) -> Path:
    """One file with TENSORS, and an index whose shards hold the same names with other values."""
    write(folder, {name: value + 1 for name, value in TENSORS.items()}, shards)
    return write(folder, TENSORS)


def test_of_two_sets_the_single_file_is_read_and_the_other_named(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "m")
    with collected() as notices:
        checkpoint = open_checkpoint(folder)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in TENSORS.items())
    shards = sorted(path.name for path in folder.glob("model-*"))
    assert (checkpoint.shards, checkpoint.index, checkpoint.other_weights) == ((SINGLE,), None, (*shards, INDEX))
    assert len(notices) == 1 and all(name in notices[0] for name in (SINGLE, INDEX, *shards))


@pytest.mark.parametrize("chosen", ["other.safetensors", "other.safetensors.index.json"])
def test_the_config_may_name_the_set(tmp_path: Path, chosen: str) -> None:
    folder = two_sets(tmp_path / "m")
    if chosen.endswith("json"):
        (folder / INDEX).rename(folder / chosen)
    else:
        (folder / SINGLE).rename(folder / chosen)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": chosen}))
    checkpoint = open_checkpoint(folder)
    assert chosen in (checkpoint.index, *checkpoint.shards)
    added = 1 if checkpoint.index else 0
    assert all(torch.equal(checkpoint.read(name), value + added) for name, value in TENSORS.items())
    assert not {chosen, *checkpoint.shards} & set(checkpoint.other_weights)


@pytest.mark.parametrize(
    "chosen", ["../model.safetensors", "sub/model.safetensors", "model.bin", "", 3, [SINGLE], "a\0b"]
)
def test_a_set_that_cannot_be_is_refused(tmp_path: Path, chosen: Any) -> None:
    folder = write(tmp_path / "m", TENSORS, config={"transformers_weights": chosen})
    assert "transformers_weights" in refusal(folder) or "cannot read" in refusal(folder)


def test_a_named_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, config={"transformers_weights": "gone.safetensors"})
    assert "'gone.safetensors'" in refusal(folder)


def test_an_index_of_the_single_file_belongs_to_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS)
    set_index(folder, dict.fromkeys(TENSORS, SINGLE))
    with collected() as notices:
        checkpoint = open_checkpoint(folder)
    assert (checkpoint.shards, checkpoint.index, checkpoint.other_weights, notices) == ((SINGLE,), INDEX, (), [])
    for weight_map in ({"norm": SINGLE}, {**dict.fromkeys(TENSORS, SINGLE), "ghost": SINGLE}, {"norm": "gone"}, {}, 3):
        set_index(folder, weight_map)
        assert open_checkpoint(folder).other_weights == (INDEX,)


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds adapter_config.json beside a model" in refusal(folder)


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    for name, shards in ((SINGLE, 0), ("model-00002-of-00002.safetensors", 2), (INDEX, 2), ("config.json", 0)):
        folder = write(tmp_path / f"{name}-{shards}", TENSORS, shards)
        (folder / name).unlink()
        (folder / name).symlink_to("../blobs/gone")
        message = refusal(folder)
        assert name in message and "a link to ../blobs/gone, which does not exist" in message


def test_shards_without_their_index_are_called_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS, 3)
    (folder / INDEX).unlink()
    message = refusal(folder)
    assert (
        "shards without their index" in message and "model-00001-of-00003.safetensors" in message and INDEX in message
    )


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 269060552\n"
PAGE = "\n<!DOCTYPE html><html><head><title>Access denied</title></head></html>\n" * 20


@pytest.mark.parametrize(("text", "said"), [(LFS, "git lfs pull"), (PAGE, "is a web page")], ids=["lfs", "page"])
@pytest.mark.parametrize(
    "name",
    ["model-00002-of-00002.safetensors", "config.json", INDEX, "tokenizer.json", "tokenizer.model", "vocab.json"],
)
def test_what_stands_in_for_a_file_is_called_by_its_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    folder = write(tmp_path / "m", TENSORS, 2)
    (folder / name).write_text(text)
    message = refusal(folder)
    assert name in message and said in message and "claims" not in message and "Expecting" not in message


def test_every_stand_in_is_told_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TENSORS)
    for name in (SINGLE, "tokenizer.json", "merges.txt"):
        (folder / name).write_text(LFS)
    assert refusal(folder).count("git lfs pull") == 3


def test_a_folder_of_models_names_them(tmp_path: Path) -> None:
    snapshot = write_tree(tmp_path / "models--user--tiny" / "snapshots" / ("a" * 40))
    for folder in (tmp_path / "models--user--tiny", tmp_path):
        message = refusal(folder)
        assert "does not hold config.json" in message and str(snapshot) in message


def write_tree(folder: Path) -> Path:
    folder.parent.mkdir(parents=True)
    return write(folder, TENSORS)


@pytest.mark.parametrize("name", ["9" * 5000, "x" * 300, "a/" + "b" * 300, "x" * 300 + "/y", "/" + "z" * 5000])
def test_a_name_that_no_file_system_takes_is_one_short_error(name: str) -> None:
    message = refusal(name)
    assert len(message) < 800 and "\n" not in message


def test_a_folder_that_may_not_be_listed_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", TENSORS)

    def refuse(_path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # a superuser may list any folder: the system's answer is put in its place
    monkeypatch.setattr("os.scandir", refuse)
    assert refusal(folder) == f"cannot read {folder}: Permission denied"


@pytest.mark.parametrize("named", [None, "one.safetensors", "many.safetensors.index.json"])
@pytest.mark.parametrize("stored", ["single", "shards", "both"])
def test_the_set_is_the_one_that_transformers_loads_and_an_artefact_holds_no_other(
    tmp_path: Path, named: str | None, stored: str
) -> None:
    folder = tmp_path / "m"
    if stored != "single":
        save_tiny(folder, llama_config(num_hidden_layers=1), seed=1, max_shard_size="20KB")
    if stored != "shards":
        save_tiny(tmp_path / "single", llama_config(num_hidden_layers=1))
        folder.mkdir(exist_ok=True)
        for path in (tmp_path / "single").iterdir():
            shutil.copy(path, folder)
    if named is not None:
        own = SINGLE if named.startswith("one") else INDEX
        if not (folder / own).exists():
            pytest.skip("the folder lacks what the config would name")
        (folder / own).rename(folder / named)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with collected():
        checkpoint = open_checkpoint(folder)
    spec, name = read_spec(checkpoint), "model.layers.0.mlp.down_proj.weight"
    before = checkpoint.read(name)
    assert torch.equal(loaded_matrix(folder), before)

    edit = LowRank(name, torch.ones(32, 1), torch.ones(1, 48))
    emit(EditPlan(Base.of(checkpoint), (edit,)), checkpoint, spec, "checkpoint", tmp_path / "out")
    assert torch.equal(loaded_matrix(tmp_path / "out"), before + 1)
    weights = {path.name for path in (tmp_path / "out").iterdir() if ".safetensors" in path.name}
    assert weights - {"plan.safetensors"} == {*checkpoint.shards, *filter(None, [checkpoint.index])}


def loaded_matrix(folder: Path) -> torch.Tensor:
    matrix: torch.Tensor = load_weights(folder).model.layers[0].mlp.down_proj.weight
    return matrix


@pytest.mark.parametrize(
    "arguments",
    [("show", "NAME"), ("verify", "NAME"), ("report", "NAME"), ("push", "NAME", "user/x"), ("revert", "NAME", "x"),
     ("emit", "NAME", "NAME", "-o", "x"), ("diff", "NAME", "NAME", "-o", "x"), ("import", "NAME", "-o", "x")],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
@pytest.mark.parametrize("name", ["9" * 5000, "x/" + "y" * 300], ids=["digits", "long"])
def test_the_command_line_takes_no_name_that_a_file_system_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(name if one == "NAME" else one for one in arguments))
    assert result.exit_code == 2 and "Traceback" not in result.output
