"""Finding the base of an artefact: where the user says, on the Hub, or in a folder of this computer."""

from __future__ import annotations

from pathlib import Path

from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.errors import CheckpointError, PlanError
from steer2edit.files.known_bases import recall
from steer2edit.plan import Base


def open_base(base: Base, where: str | Path | None = None) -> Checkpoint:
    """The checkpoint that a plan was made for.

    ``where`` is a folder or a Hub id; without it a base on the Hub is found by its name, and a local one by the note that
    ``emit`` left on this computer, or as a folder of its name here. Raises PlanError where no local base is found.
    """
    if where is not None:
        return open_checkpoint(where)
    if base.revision is not None:
        return open_checkpoint(base.name, base.revision)
    noted, here = recall(base.fingerprint), Path(base.name)
    changed = []
    for folder in (noted, here if here.is_dir() else None):
        if folder is None:
            continue
        try:
            checkpoint = open_checkpoint(folder)
            if checkpoint.fingerprint == base.fingerprint:
                return checkpoint
        except CheckpointError:  # no longer a sound checkpoint
            pass
        changed.append(str(folder))
    tried = f" ({' and '.join(changed)} has other weights now)" if changed else ""
    raise PlanError(
        f"the base was a local folder called {base.name}, and it is not known where it lies now{tried}; "
        "name it with --base FOLDER"
    )
