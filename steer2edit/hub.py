"""Publishing an artefact on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from steer2edit.errors import Steer2EditError
from steer2edit.targets import EVALUATION, REPORT, read_receipt

_IGNORED = re.compile(r"(^|/)\.")


def push(folder: str | Path, repository: str, *, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Create ``repository`` if need be and upload the artefact's files; running it again resumes.

    Returns ``files`` and ``url`` (None for a dry run). Raises Steer2EditError with the Hub's reason.
    """
    folder = Path(folder)
    read_receipt(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise Steer2EditError(f"{repository!r} is no repository on the Hub; expected user/name")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    # questions and answers may be the user's own: they stay here
    files = [name for name in files if not _IGNORED.search(name) and name not in (EVALUATION, REPORT)]
    if dry_run:
        return {"repository": repository, "files": files, "url": None}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(library_name="steer2edit")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload with steer2edit",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Steer2EditError(f"the Hub did not take {repository}: {reason}") from None
    return {"repository": repository, "files": files, "url": str(commit.commit_url)}
