"""The Hugging Face Hub: repositories by name and revision, fetched through huggingface_hub, and its errors in one line.

Cache, token, endpoint and offline mode are huggingface_hub's own (``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from steer2edit.errors import CheckpointError, HubError, listing, without_passwords

_NAME = r"[A-Za-z0-9_-][\w.-]*"
_REFERENCE = re.compile(rf"({_NAME}(?:/{_NAME})?)(?:@([\w][\w./-]*))?", re.ASCII)
# a name that ends so is a file that does not exist, not a repository
_FILES = frozenset([".safetensors", ".gguf", ".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt", ".pt", ".npz"])


@dataclass(frozen=True)
class Reference:
    """A repository, and the branch, tag or commit of it; None is the default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def read_reference(text: str | Path, revision: str | None = None) -> Reference | None:
    """``user/name`` or ``user/name@revision``; None where the text is of another form.

    Raises CheckpointError where both the text and ``revision`` name one, and they differ.
    """
    match = _REFERENCE.fullmatch(str(text))
    if match is None or (match[2] is None and PurePosixPath(match[1]).suffix in _FILES):
        return None
    if revision is not None and match[2] not in (None, revision):
        raise CheckpointError(f"{text} and --revision {revision} name two revisions; give one of them")
    return Reference(match[1], match[2] or revision)


def fetch(where: str | Path, only: Sequence[str] | None = None) -> Path:
    """The local path, or the snapshot of ``user/name[@revision]`` on the Hub.

    A path that does not exist and is not the name of a repository is given back as it is. Raises HubError with the reason, also
    for a path that no file system takes or that may not be looked at.
    """
    path = Path(os.path.expanduser(where))
    check_path(path)
    reference = read_reference(where)
    if path.exists() or reference is None or "/" not in reference.repository:
        return path
    try:
        return snapshot(reference, only=only)
    except HubError as error:
        raise HubError(f"{where} does not exist locally and could not be fetched from the Hub: {error}") from None


def check_path(path: Path) -> None:
    """Raise HubError for a path that cannot be looked at.

    Its name is too long, or a folder on the way may not be read.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        name = str(path)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HubError(f"cannot look at {name if len(name) <= 200 else f'{name[:200]}…'}: {reason}") from None


def snapshot(reference: Reference, only: Sequence[str] | None = None, ignore: Sequence[str] | None = None) -> Path:
    """The folder of a repository's files in the cache, fetched where they are not there. Raises HubError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                reference.repository,
                revision=reference.revision,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=None if ignore is None else list(ignore),
            )
        )
    except hub_errors() as error:
        raise HubError(explain(error, str(reference))) from None


def dataset_file(reference: Reference, file: str, formats: Sequence[str]) -> tuple[Path, str]:
    """The local copy of a dataset's file, and the file's name.

    Without a name it is the only file of these ``formats``.

    Raises HubError with the reason, or with the names there are where several fit.
    """
    import huggingface_hub

    name, revision = reference.repository, reference.revision
    try:
        if not file:
            names = huggingface_hub.list_repo_files(name, repo_type="dataset", revision=revision)
            paths = [path for path in map(PurePosixPath, sorted(names)) if path.suffix.lower() in formats]
            files = [str(path) for path in paths if path.stem not in ("dataset_info", "dataset_infos")]
            if not files:
                raise HubError(f"the dataset {reference} on the Hub holds no file in a format of {', '.join(formats)}")
            if len(files) > 1:
                raise HubError(
                    f"the dataset {reference} on the Hub holds several data files; name one as {reference}:{files[0]}\n"
                    f"{listing(files)}"
                )
            file = files[0]
        return Path(huggingface_hub.hf_hub_download(name, file, repo_type="dataset", revision=revision)), file
    except hub_errors() as error:
        whole = f"{reference}:{file}" if file else str(reference)
        raise HubError(f"cannot read {whole}: no such file here, and the Hub says: {explain(error, whole)}") from None


def hub_errors() -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises for a request that failed, whichever HTTP library it is built on."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (HFValidationError, OSError, *transport)


def explain(error: BaseException, what: str) -> str:
    """One line: why the Hub did not do what was asked about ``what``, and what to change."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE and isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return (
            f"{what} is not whole in the cache ({constants.HF_HUB_CACHE}), and the offline mode forbids to fetch it; "
            "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE)"
        )
    endpoint = without_passwords(constants.ENDPOINT)
    # what was raised last may only say that a file was not sent, or is not in the cache either
    causes = _chain(error)
    answered = next((cause for cause in causes if getattr(cause, "response", None) is not None), None)
    if answered is None:
        lost = next((cause for cause in causes if _is_transport(cause)), None)
        return _said(error) if lost is None else f"the Hub at {endpoint} cannot be reached: {_said(lost)}"
    if isinstance(answered, GatedRepoError):
        return f"{what} is gated: accept its terms at {endpoint}/{what.partition('@')[0]}, then log in"
    status, said = getattr(answered, "response").status_code, _said(answered)  # noqa: B009
    return f"{_MEANINGS.get(status, _MEANINGS[status // 100 * 100]).format(what=what)} (HTTP {status}: {said})"


_LOGIN = "log in with 'hf auth login', or set HF_TOKEN to a token that may"
_MEANINGS = {
    401: "{what} does not exist, or is private, or the token is not valid: " + _LOGIN + " read or write it",
    402: "the Hub has no room left for {what}: the account's quota is used up",
    403: "the token may not do this to {what}: " + _LOGIN,
    404: "{what} does not exist on the Hub, or the token may not see it",
    409: "{what} is being changed by somebody else; run the command again",
    412: "{what} is being changed by somebody else; run the command again",
    413: "the Hub has no room left for {what}: a file or the account's quota is too large",
    429: "the Hub asks to wait; run the command again later, it goes on where it stopped",
    507: "the Hub has no room left for {what}: the account's quota is used up",
    300: "the Hub sent us elsewhere for {what}",
    400: "the Hub refused the request for {what}",
    500: "the Hub is out of order; run the command again, it goes on where it stopped",
}


def _said(error: BaseException) -> str:
    """The Hub's own words, or the error's, in one line."""
    server = getattr(error, "server_message", None)
    lines = [line.strip() for line in (server or str(error) or type(error).__name__).splitlines() if line.strip()]
    text = without_passwords(lines[0] if lines else type(error).__name__)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those behind it."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def _is_transport(error: BaseException) -> bool:
    """Whether an error is about the connection, in any of the libraries that huggingface_hub was built on."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "Timeout"})
