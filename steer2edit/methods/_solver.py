r"""One solver for additive edits: the least squared effect elsewhere, with the mean effects that are asked for.

    minimise  aᵀ S a   subject to   Mᵀ a = e      ⇒      a = S⁻¹ M (Mᵀ S⁻¹ M)⁻¹ e

``S`` is a sum of weighted second moments of a writer's input, in blocks of a head's columns or one number for each column, plus
eps times its mean diagonal. The columns of ``M`` are mean inputs: of the behaviour's data, the difference of its classes, and of
texts on which there is to be no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from steer2edit.capture.populations import Source

EPS = 0.01
"""Of the moments' mean diagonal: keeps a direction that was nearly silent in the data from carrying much."""
SILENT_SHARE = 0.01
"""Of a block's energy on the texts to keep, what the space of a hard --keep may hold."""
_TINY = 1e-12
LEAST = 1e-6
"""Of an input with an effect other than 0, in the metric of S⁻¹, what must be left beside the other inputs."""


@dataclass(frozen=True)
class Energy:
    """``S``, float64: ``moments`` [blocks, d, d] of blocks of columns, or [in] of single ones."""

    moments: torch.Tensor

    @classmethod
    def of(cls, parts: Mapping[Source, torch.Tensor], weights: Mapping[Source, float], eps: float = EPS) -> Energy:
        """The weighted sum of ``parts``, with ``eps`` of its mean diagonal on the diagonal."""
        import torch

        total = sum(weight * parts[name].double() for name, weight in weights.items() if weight)
        assert isinstance(total, torch.Tensor)
        if total.ndim == 1:
            return cls(total + (eps * total.mean() + _TINY))
        floor = eps * total.diagonal(dim1=1, dim2=2).mean() + _TINY
        return cls(total + floor * torch.eye(total.shape[1], dtype=total.dtype))

    def inverse(self, columns: torch.Tensor) -> torch.Tensor:
        """``S⁻¹`` times ``columns`` [in, m]."""
        import torch

        if self.moments.ndim == 1:
            return columns / self.moments[:, None]
        by_block = columns.view(len(self.moments), -1, columns.shape[1])
        found: torch.Tensor = torch.linalg.solve(self.moments, by_block)
        return found.reshape(columns.shape)


@dataclass(frozen=True)
class SilentSpace:
    """Where some texts' inputs have hardly any energy, as in AlphaEdit (arXiv 2410.02355) and AlphaSteer (2506.07022).

    The columns ``inside`` [blocks, d] of ``basis`` [blocks, d, d] span it. For single columns there is no basis, and ``inside``
    is [in].
    """

    basis: torch.Tensor | None
    inside: torch.Tensor

    @classmethod
    def of(cls, moments: torch.Tensor, share: float = SILENT_SHARE) -> SilentSpace:
        """The eigenvectors of ``moments`` with the smallest eigenvalues, which hold ``share`` of a block's energy together."""
        import torch

        if moments.ndim == 1:
            order = moments.argsort()
            inside = torch.zeros_like(moments, dtype=torch.bool)
            inside[order] = moments[order].cumsum(0) <= share * moments.sum()
            return cls(None, inside)
        values, vectors = torch.linalg.eigh(moments.double())
        values = values.clamp(min=0)
        return cls(vectors, values.cumsum(dim=1) <= share * values.sum(dim=1, keepdim=True))

    def inverse(self, energy: Energy) -> Callable[[torch.Tensor], torch.Tensor]:
        """``U (Uᵀ S U)⁻¹ Uᵀ`` on columns [in, m], where U spans this space."""
        import torch

        S, inside = energy.moments, self.inside
        if self.basis is None or S.ndim == 1:
            return lambda columns: energy.inverse(columns) * inside.reshape(-1, 1)
        V = self.basis
        both = inside[:, :, None] & inside[:, None, :]
        turned = torch.where(both, V.mT @ S @ V, torch.eye(S.shape[1], dtype=S.dtype))

        def apply(columns: torch.Tensor) -> torch.Tensor:
            by_block = V.mT @ columns.view(len(S), -1, columns.shape[1]) * inside[:, :, None]
            found: torch.Tensor = V @ (torch.linalg.solve(turned, by_block) * inside[:, :, None])
            return found.reshape(columns.shape)

        return apply


def least_energy(
    inverse: Callable[[torch.Tensor], torch.Tensor], inputs: Sequence[torch.Tensor], effects: Sequence[float]
) -> torch.Tensor | None:
    """``a`` [in], float64, of least energy with ``a · x`` as in ``effects`` for each x of ``inputs``.

    ``inverse`` is S⁻¹ on columns. None where there is no such functional: an input with an effect other than 0 is a mixture of
    the other inputs, or is nothing.
    """
    import torch

    Y = inverse(torch.stack([*inputs], dim=1).double())
    gram = torch.stack([*inputs], dim=1).double().T @ Y
    sizes = gram.diagonal().clamp(min=0).sqrt()
    asked = [i for i, effect in enumerate(effects) if effect]
    if any(not float(gram[i, i]) > _TINY for i in asked):
        return None
    kept = [i for i in range(len(effects)) if effects[i] or float(sizes[i]) > _TINY]
    scale = sizes[kept]
    unit = gram[kept][:, kept] / torch.outer(scale, scale)
    for place in (kept.index(i) for i in asked):
        # what S⁻¹ leaves of this input beside the others
        others = [i for i in range(len(kept)) if i != place]
        if others:
            shared = torch.linalg.lstsq(unit[others][:, others], unit[others, place][:, None], driver="gelsd").solution
            if 1 - float(unit[place, others] @ shared[:, 0]) < LEAST:
                return None
    e = torch.tensor([effects[i] for i in kept], dtype=torch.float64) / scale
    a: torch.Tensor = Y[:, kept] @ (torch.linalg.lstsq(unit, e[:, None], driver="gelsd").solution[:, 0] / scale)
    return a
