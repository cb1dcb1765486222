r"""A dictionary of the model's own activations, and the vector that its atoms give (ITDA, arXiv 2505.17769).

An atom is an activation of length one. Activations of the stream after one block are read in turn; each is decomposed by matching
pursuit, a few atoms at a time, and one whose error is larger than a bound becomes an atom itself. Then the contrast data is
decomposed: atoms whose mean coefficient differs between the classes, by the most standard errors over pairs, make up the vector

    v = Σ_a (mean coefficient, positive − negative) · atom_a.

Memory holds the dictionary and one batch. The model is run twice over the data, once to find atoms and once to weigh them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer2edit.capture.pairs import Pairs
from steer2edit.capture.vectors import Vectors
from steer2edit.data.answers import LABELS
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, PlanError
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import LoadedModel

_CHUNK = 64
"""Activations that are decomposed together while the dictionary grows."""
_PART = 16
"""Examples whose activations are in memory together."""
_LEAST_PAIRS = 3


@dataclass(frozen=True)
class Settings:
    """How a dictionary is made: its largest size, atoms in a decomposition, and the energy that may be missed."""

    atoms: int = 512
    sparsity: int = 8
    error: float = 0.1
    taken: int = 8

    def __post_init__(self) -> None:
        if self.atoms < 1 or self.sparsity < 1 or self.taken < 1 or not 0 < self.error < 1:
            raise PlanError(
                f"a dictionary of {self.atoms} atoms, {self.sparsity} in a decomposition, an error of {self.error} and "
                f"{self.taken} taken: expected numbers of 1 or more, and an error between 0 and 1"
            )


@dataclass
class Dictionary:
    """``atoms`` [n, hidden], float32, each of length one. ``origins`` are label, row and position of the token behind each."""

    atoms: torch.Tensor
    origins: list[tuple[str, int, int]] = field(default_factory=list)

    def decompose(self, x: torch.Tensor, sparsity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients [tokens, n] of ``x`` [tokens, hidden] by matching pursuit, and what is left of x."""
        coefficients, rest = torch.zeros(len(x), len(self.atoms)), x.clone()
        for _ in range(min(sparsity, len(self.atoms))):
            products = rest @ self.atoms.T
            best = products.abs().argmax(dim=1, keepdim=True)
            size = products.gather(1, best)
            coefficients.scatter_add_(1, best, size)
            rest = rest - size * self.atoms[best[:, 0]]
        return coefficients, rest

    def missed(self, x: torch.Tensor, sparsity: int) -> torch.Tensor:
        """The share of each activation's energy that its decomposition misses, [tokens]."""
        _, rest = self.decompose(x, sparsity)
        return rest.square().sum(dim=1) / x.square().sum(dim=1).clamp(min=1e-30)

    def grow(self, x: torch.Tensor, origins: Sequence[tuple[str, int, int]], settings: Settings) -> None:
        """Take in activations that the dictionary misses by more than the bound, the worst of a chunk first."""
        for first in range(0, len(x), _CHUNK):
            chunk = x[first : first + _CHUNK]
            while len(self.atoms) < settings.atoms:
                missed = self.missed(chunk, settings.sparsity)
                worst = int(missed.argmax())
                if float(missed[worst]) <= settings.error:
                    break
                atom = torch.nn.functional.normalize(chunk[worst : worst + 1], dim=1)
                self.atoms = torch.cat((self.atoms, atom))
                self.origins.append(origins[first + worst])


@dataclass(frozen=True)
class Weighed:
    """How each atom tells the classes apart: mean difference of coefficients over pairs, and its size in standard errors.

    ``missed`` is the share of the contrast data's energy that the decompositions miss.
    """

    difference: torch.Tensor
    errors: torch.Tensor
    missed: float

    def chosen(self, count: int) -> list[int]:
        """The atoms of the largest differences in standard errors, ``count`` of them at most; none that no pair uses."""
        ranked = self.errors.abs().argsort(descending=True).tolist()
        return [atom for atom in ranked[:count] if float(self.difference[atom]) != 0]


def by_dictionary(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    layer: int,
    settings: Settings = Settings(),
    *,
    name: str | None = None,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> tuple[Vectors, Dictionary, Weighed]:
    """The vector at ``residual.<layer>`` of contrast data and background, with the dictionary behind it.

    Raises PlanError for a layer that is not there, and DataError for data with under three pairs or that no atom tells apart.
    """
    if not 0 <= layer < loaded.spec.layers:
        raise PlanError(f"layer {layer} is not in this model, which has the layers 0-{loaded.spec.layers - 1}")
    pairs = Pairs.of((one.label, one.row) for one in examples)
    if len(pairs.rows) < _LEAST_PAIRS:
        raise DataError(
            f"{len(pairs.rows)} rows have both classes; a dictionary's atoms are weighed on {_LEAST_PAIRS} at least"
        )
    dictionary = Dictionary(torch.zeros(0, loaded.spec.hidden_size))
    # a mixed order, so that no class fills the dictionary
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [examples[i] for i in order]
    for example, x in _activations(loaded, mixed, layer, batch_tokens, progress, "atoms"):
        origins = [(example.label, example.row, example.start - 1 + i) for i in range(len(x))]
        dictionary.grow(x, origins, settings)
    contrast = [one for one in examples if one.label in LABELS]
    weighed = _weighed(loaded, contrast, layer, dictionary, pairs, settings, batch_tokens, progress)
    chosen = weighed.chosen(settings.taken)
    if not chosen:
        raise DataError(f"no atom of the dictionary tells the classes apart after layer {layer}")
    v = weighed.difference[chosen] @ dictionary.atoms[chosen].double()
    atoms = [
        {"atom": atom, "difference": float(weighed.difference[atom]), "standard_errors": float(weighed.errors[atom]),
         "label": dictionary.origins[atom][0], "row": dictionary.origins[atom][1], "position": dictionary.origins[atom][2]}
        for atom in chosen
    ]  # fmt: skip
    source: dict[str, Any] = {
        "format": "steer2edit activation dictionary", "fingerprint": loaded.fingerprint, "name": name, "layer": layer,
        "size": len(dictionary.atoms), "sparsity": settings.sparsity, "missed": weighed.missed, "atoms": atoms,
    }  # fmt: skip
    source = {key: value for key, value in source.items() if value is not None}
    return Vectors({f"residual.{layer}": v.float()}, source=source), dictionary, weighed


def _weighed(
    loaded: LoadedModel,
    contrast: Sequence[Encoded],
    layer: int,
    dictionary: Dictionary,
    pairs: Pairs,
    settings: Settings,
    batch_tokens: int,
    progress: Progress,
) -> Weighed:
    differences = torch.zeros(len(pairs.rows), len(dictionary.atoms), dtype=torch.float64)
    energy = missed = 0.0
    for example, x in _activations(loaded, contrast, layer, batch_tokens, progress, "coefficients"):
        coefficients, rest = dictionary.decompose(x, settings.sparsity)
        energy, missed = energy + float(x.square().sum()), missed + float(rest.square().sum())
        shares = pairs.shares([(example.label, example.row)])
        if shares is not None:
            differences += shares.double() * coefficients.mean(dim=0).double()
    mean = differences.mean(dim=0)
    deviation = differences.std(dim=0) / len(differences) ** 0.5
    errors = torch.where(mean == 0, 0.0, mean / deviation.clamp(min=1e-12))
    return Weighed(mean, errors, missed / max(energy, 1e-30))


def _activations(
    loaded: LoadedModel, examples: Sequence[Encoded], layer: int, batch_tokens: int, progress: Progress, stage: str
) -> Iterator[tuple[Encoded, torch.Tensor]]:
    """Each example with the stream after the layer at its span's positions, [tokens, hidden] float32."""
    loaded.check_tokens(example.ids for example in examples)
    seen: list[torch.Tensor] = []
    module = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        with progress(stage, total=sum(len(example.ids) for example in examples)) as advance:
            # in the order of the examples: which atoms there are hangs on it
            for first in range(0, len(examples), _PART):
                part = examples[first : first + _PART]
                states: dict[int, torch.Tensor] = {}
                for indices in batches([len(one.ids) for one in part], batch_tokens):
                    ids, mask = pad_right([part[i].ids for i in indices], loaded.padding, loaded.device)
                    with torch.inference_mode():
                        loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
                    states |= dict(zip(indices, seen.pop().float().cpu(), strict=True))
                for i, one in enumerate(part):
                    yield one, states[i][one.start - 1 : len(one.ids) - 1].clone()
                    advance(len(one.ids))
    finally:
        handle.remove()
