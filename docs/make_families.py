"""Writes docs/families.md from the data that the compiler reads: python docs/make_families.py"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from steer2edit.architecture.families import FAMILIES, MULTIMODAL, REFUSED, Family, Mixture
from steer2edit.architecture.mixtures import MIXTURES
from steer2edit.targets.lora import NO_ADAPTER

PAGE = Path(__file__).parent / "families.md"
_PLAIN = Family("", ())
_LAYOUTS = {
    "separate": "a tensor each",
    "out_in": "one tensor, experts × out × in",
    "in_out": "one tensor, experts × in × out",
    "stacked": "one tensor, experts stacked",
}


def page() -> str:
    """The whole page."""
    dense, mixtures = (sum(len(family.model_types) for family in kind) for kind in (FAMILIES, MIXTURES))
    plain = ["layout", "model types", "attention, mixer", "MLP", "norm after", "stored"]
    routed = ["layout", "model types", "attention, mixer", "experts", "stored", "shared expert", "router", "bias"]
    return f"""# Model families

<!-- made by docs/make_families.py from families.py and mixtures.py of steer2edit/architecture; do not edit by hand -->

{dense} dense model types, {mixtures} mixtures of experts and {len(MULTIMODAL)} multimodal models are described and tested.
A model is known by `model_type` in its `config.json`. Each is built tiny and at random in the tests
(`tests/test_families.py`, `tests/test_mixtures.py`), where two leak tests decide whether the description is whole: with all
its writers zeroed, nothing in the model's output may depend on the context; and then no other matrix of the blocks may
matter. Dense and multimodal models are also compiled to a checkpoint and to an adapter, and both are verified.

A type that is not listed compiles too if every block has llama's names (`self_attn.o_proj`, `mlp.down_proj`) and no vector
but llama's norms. Everything else stops with an error that lists the tensors found.
How to add a family: [extending.md](extending.md).

## Dense

A head is a block of `head_dim` input columns of the attention's writer, a neuron one input column of the MLP's. A mixer
(Mamba, convolution, linear attention) has no heads: its single input columns are its components. A *norm after* the writer
stands between it and the residual stream: directions are carried through its gain (1 + the stored value where it says so).

{_table(plain, map(_dense, FAMILIES))}

PEFT refuses to wrap Mamba's `out_proj` in {_names(NO_ADAPTER)}: there an edit of a mixer is emitted as a checkpoint only.

## Mixtures of experts

{_table(routed, map(_mixture, MIXTURES))}

## Multimodal

The language model inside is edited where it lies; vision and audio towers are copied byte for byte. Tested:
{_names(MULTIMODAL)}.

## Refused

{_table(["model types", "because"], _refused())}

Quantised checkpoints are refused as well, but for fp8 with block scales: compile the unquantised one and quantise the
result, or serve a LoRA beside the quantised base.
"""


def _dense(family: Family) -> list[str]:
    return [
        family.name,
        _names(family.model_types),
        _attention(family),
        "–" if _only_mixers(family) and family.mlp_out == _PLAIN.mlp_out else _code(family.mlp_out),
        _norms(family),
        _stored(family),
    ]


def _mixture(family: Family) -> list[str]:
    mixture = family.mixture or Mixture()
    return [
        family.name,
        _names(family.model_types),
        _attention(family),
        _code(mixture.output),
        _LAYOUTS[mixture.layout],
        _code(mixture.shared) if mixture.shared else "–",
        _code(mixture.router),
        f"{_code(mixture.bias)} (on {mixture.bias_of})" if mixture.bias else "–",
    ]


def _only_mixers(family: Family) -> bool:
    return family.partial and family.mixture is None


def _attention(family: Family) -> str:
    leaves = family.mixers if _only_mixers(family) else (family.attn_out, *family.mixers)
    return ", ".join(map(_code, dict.fromkeys(leaves)))


def _norms(family: Family) -> str:
    named = [name for name in (family.attn_norm, family.mlp_norm) if name]
    if not named:
        return "–"
    offset = " (1 + value)" if family.norm_offset else ""
    return ", ".join(map(_code, named)) + offset + (", not in blocks with a mixer" if family.bare_mixers else "")


def _stored(family: Family) -> str:
    return "in × out" if family.orientation == "in_out" else "out × in"


def _refused() -> list[list[str]]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in REFUSED.items():
        by_reason[reason].append(name)
    return [[_names(names), reason] for reason, names in by_reason.items()]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def _code(text: str) -> str:
    return f"`{text}`"


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
