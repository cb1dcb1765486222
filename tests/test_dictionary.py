"""A dictionary of activations: its atoms are activations, pursuit leaves less and less, and the classes' atoms are found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROWS, run

from steer2edit.capture.dictionary import Dictionary, Settings, by_dictionary
from steer2edit.capture.vectors import Vectors
from steer2edit.data import contrast
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded, encode
from steer2edit.errors import DataError, PlanError
from steer2edit.runtime.model import LoadedModel


@pytest.fixture(scope="module")
def examples(loaded: LoadedModel) -> list[Encoded]:
    rows = [
        contrast.Example(row["prompt"], row[label], label, "test", index)
        for index, row in enumerate(ROWS)
        for label in LABELS
    ]
    return [*encode(rows, loaded.tokenizer), Encoded(tuple(range(4, 30)), 1, "background", 0)]


def test_a_pursuit_leaves_less_with_every_atom() -> None:
    generator = torch.Generator().manual_seed(0)
    dictionary = Dictionary(torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=1))
    x = torch.randn(50, 8, generator=generator)
    missed = [dictionary.missed(x, sparsity) for sparsity in range(1, 12)]
    assert all(bool((after <= before + 1e-6).all()) for before, after in itertools.pairwise(missed))
    coefficients, rest = dictionary.decompose(x, 5)
    assert torch.allclose(coefficients @ dictionary.atoms + rest, x, atol=1e-5)
    assert int((coefficients != 0).sum(dim=1).max()) <= 5


def test_no_activation_is_missed_by_more_than_the_bound_and_more_atoms_miss_less() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    origins = [("positive", i, i) for i in range(300)]
    grown = {}
    for atoms in (4, 16, 300):
        dictionary = Dictionary(torch.zeros(0, 8))
        dictionary.grow(x, origins, Settings(atoms=atoms, sparsity=3, error=0.2))
        assert len(dictionary.atoms) == len(dictionary.origins) <= atoms
        assert torch.allclose(dictionary.atoms.norm(dim=1), torch.ones(len(dictionary.atoms)), atol=1e-6)
        for atom, (_, row, _) in zip(dictionary.atoms, dictionary.origins, strict=True):
            assert torch.allclose(atom, x[row] / x[row].norm(), atol=1e-6)
        grown[atoms] = float(dictionary.missed(x, 3).mean())
    assert grown[300] < grown[16] < grown[4] and grown[300] <= 0.2


def test_a_direction_that_one_class_has_is_found() -> None:
    # each activation is one of four axes; only the positive class uses the last
    axes = torch.eye(6)[:4]
    x = axes[torch.tensor([0, 1, 2, 3, 0, 1])] * torch.tensor([[3.0], [1.0], [2.0], [5.0], [1.0], [4.0]])
    dictionary = Dictionary(torch.zeros(0, 6))
    dictionary.grow(x, [("positive", 0, i) for i in range(6)], Settings(atoms=9, sparsity=1, error=0.01))
    assert sorted(map(tuple, dictionary.atoms.tolist())) == sorted(map(tuple, axes.tolist()))


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_the_vector_is_the_classes_mean_difference_of_coefficients(
    loaded: LoadedModel, examples: list[Encoded], batch_tokens: int
) -> None:
    settings = Settings(atoms=12, sparsity=2, taken=3)
    vectors, dictionary, weighed = by_dictionary(loaded, examples, 1, settings, batch_tokens=batch_tokens)
    states: dict[str, list[torch.Tensor]] = {label: [] for label in LABELS}
    activations = []
    for one in examples:
        hidden = loaded.model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states[2][0].detach()
        read = hidden[one.start - 1 : len(one.ids) - 1]
        activations.append(torch.nn.functional.normalize(read, dim=1))
        if one.label in LABELS:
            states[one.label].append(dictionary.decompose(read, 2)[0].mean(dim=0))
    every = torch.cat(activations)
    assert float((dictionary.atoms @ every.T).max(dim=1).values.min()) == pytest.approx(1, abs=1e-5)
    difference = torch.stack(states["positive"]) - torch.stack(states["negative"])
    assert torch.allclose(weighed.difference.float(), difference.mean(dim=0), atol=1e-4)
    chosen = weighed.chosen(3)
    expected = weighed.difference[chosen].float() @ dictionary.atoms[chosen]
    assert list(vectors.directions) == ["residual.1"]
    assert torch.allclose(vectors.directions["residual.1"], expected, atol=1e-5)
    assert 0 < weighed.missed < 1 and len(vectors.source["atoms"]) == 3


def test_bad_input_is_refused(loaded: LoadedModel, examples: list[Encoded]) -> None:
    with pytest.raises(PlanError, match="0-2"):
        by_dictionary(loaded, examples, 3)
    with pytest.raises(DataError, match="3 at least"):
        by_dictionary(loaded, examples[:4], 1)
    with pytest.raises(PlanError, match="error between 0 and 1"):
        Settings(error=1.5)


def test_the_command_writes_a_file_that_compile_takes(tiny_llama: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "x.vectors.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["vectors", tiny_llama, "--data", data, "--kind", "dictionary", "--layer", 1, "--atoms", 16]
    result = run(*command, "-o", out)
    assert result.exit_code == 0 and "standard errors" in result.output
    assert list(Vectors.load(out).directions) == ["residual.1"]
    edit = ["compile", tiny_llama, "--data", data, "--vectors", out, "--strength", 1, "--no-report"]
    assert run(*edit, "--out", tmp_path / "out").exit_code == 0
    refused = run(*command[:-2], "--layer", 9, "-o", tmp_path / "y.vectors.safetensors")
    assert refused.exit_code == 2
