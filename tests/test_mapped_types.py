"""Every text model that transformers maps is described, or refused with a reason.

A type that a new release of transformers brings fails here by its name. Describe it in ``architecture/families.py`` or
``mixtures.py``, or refuse it in ``refusals.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from steer2edit.architecture.find_family import KNOWN
from steer2edit.architecture.refusals import REFUSED
from steer2edit.architecture.wrappers import MULTIMODAL


def mapped() -> Iterator[str]:
    """The causal and image-text model types of the installed transformers."""
    yield from MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    yield from MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def described() -> set[str]:
    return {*MULTIMODAL, *(name for family in KNOWN for name in family.model_types)}


def test_every_type_that_transformers_maps_is_described_or_refused() -> None:
    unknown = set(mapped()) - described() - set(REFUSED)
    assert not unknown, f"neither described nor refused: {', '.join(sorted(unknown))}"


def test_no_type_is_described_and_refused() -> None:
    assert not described() & set(REFUSED)


def test_every_refusal_has_a_reason_that_ends_its_message() -> None:
    for name, reason in REFUSED.items():
        assert len(reason.split()) > 4 and not reason.endswith("."), name
