"""Every operator as an artefact against the hooks with which its paper does the same: float32 logits, target by target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROWS, llama_config, save_tiny
from family_configs import family_config
from family_models import CONTEXTS
from operator_rows import all_rows
from operator_rows.row import Row
from operator_rows.subject import Subject

from steer2edit import targets
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.errors import TargetError

BEHAVIOR = Behavior(
    "rows", [Example(row["prompt"], row[label], label, "test", i) for i, row in enumerate(ROWS) for label in LABELS]
)
CASES = [(row, family) for row in all_rows() for family in row.families]


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    subjects: dict[str, Subject] = {}

    def make(family: str) -> Subject:
        if family not in subjects:
            folder = tmp_path_factory.mktemp("operators") / family
            save_tiny(folder, llama_config() if family == "llama" else family_config(family))
            subjects[family] = Subject.of(family, folder, BEHAVIOR, CONTEXTS)
        return subjects[family]

    return make


# PEFT reads a property that transformers 5 renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("row", "family"), CASES, ids=[f"{row.name} on {family}" for row, family in CASES])
def test_an_artefact_does_what_the_hooks_do_or_is_refused(
    row: Row, family: str, subject_of: Callable[[str], Subject], tmp_path: Path
) -> None:
    subject = subject_of(family)
    plan, hooked = row.planned(subject), subject.hooked(row.hooks(subject))
    effect = float((hooked - subject.base).abs().max())
    assert effect > 0.01, "the hooks do nothing"
    wrong = []
    for target in targets.names():
        if target not in row.carriers(family):
            with pytest.raises(TargetError):
                subject.artefact(plan, target, tmp_path / target)
            continue
        artefact = subject.artefact(plan, target, tmp_path / target)
        error, bound = float((artefact - hooked).abs().max()) / effect, row.carried[target]
        if not error <= bound:
            wrong.append(f"{target}: {error:.2g} of the effect, at most {bound:g} expected")
    assert not wrong, "\n".join(wrong)
    assert torch.equal(subject.logits(), subject.base), "something stayed on the base"
