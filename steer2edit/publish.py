"""Publishing on the Hub: what of a folder goes up, and what never does.

Uploaded: the files on the receipt that loading needs, the receipt, the plan, and a card with numbers. Never uploaded: questions
and answers, and files that emit did not write. All that goes up is searched first for tokens, keys, passwords, and paths of
this machine.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from steer2edit import targets
from steer2edit.artefact import model_card
from steer2edit.artefact.receipt import read_receipt
from steer2edit.checkpoint import INDEX
from steer2edit.errors import HubError, Steer2EditError, listing, without_passwords
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.files.hub import Reference, explain, hub_errors, read_reference
from steer2edit.files.layout import ADAPTER_CONFIG, CARD, EVALUATION, PLAN, PLAN_FILE, RECEIPT, REPORT, TRADEOFF
from steer2edit.files.secrets import secrets_in, text_of
from steer2edit.lowering.target import HERE
from steer2edit.notices import notice
from steer2edit.plan import EditPlan
from steer2edit.report import card_section

# a vocabulary may well hold a folder's name
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "tekken.json", "added_tokens.json", "*.tiktoken"),
    *("spiece.model", "sentencepiece*.model", "*.gguf"),
)
_WEIGHTS = frozenset([".safetensors", ".bin", ".pt", ".pth", ".gguf"])


@dataclass(frozen=True)
class Parcel:
    """What a push sends: each file's name there, with its place here or its content; what stays here, and why."""

    files: Mapping[str, Path | bytes]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        given = self.files[name]
        return len(given) if isinstance(given, bytes) else given.stat().st_size


def push(
    source: str | Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
    include: Sequence[str] = (),
) -> dict[str, Any]:
    """Send an artefact's folder, or a plan's file, to ``user/name``, made if need be; running it again resumes.

    ``base_model`` is the base's id on the Hub and ``licence`` the card's licence, where the receipt does not know them;
    ``include`` are patterns of further files of the folder. Returns ``files`` and ``left_out``, and ``url`` (None for a dry
    run, which needs no network). Raises HubError with the Hub's reason, and Steer2EditError where something must not go up.
    """
    reference = read_reference(repository)
    if reference is None or reference.revision or "/" not in repository:
        raise HubError(f"{repository!r} is not a repository on the Hub; expected user/name")
    source = Path(source).expanduser()
    stated = _stated(base_model, licence)
    parcel = pack_plan(source, repository, stated) if source.is_file() else pack(source, repository, stated, include)
    _refuse_leaks(parcel, source)
    result = {
        "repository": repository,
        "files": [{"file": name, "bytes": parcel.size(name)} for name in sorted(parcel.files)],
        "bytes": sum(map(parcel.size, parcel.files)),
        "left_out": dict(parcel.left_out),
        "notes": list(parcel.notes),
        "url": None,
    }
    return result if dry_run else {**result, "url": _send(parcel, repository, private)}


def pack(folder: Path, repository: str, stated: Mapping[str, Any], include: Sequence[str] = ()) -> Parcel:
    """The files of an artefact's folder that go up. Raises PlanError without a receipt, HubError where a file is missing."""
    receipt = read_receipt(folder)
    written = receipt.get("files")
    if not isinstance(written, list):
        raise HubError(f"{folder / RECEIPT} does not list the artefact's files; emit it again")
    target = targets.load(receipt["target"])
    needed = target.loading_files(folder, written)
    files: dict[str, Path | bytes] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        if reason := _reason_to_stay(path, name, folder, written, needed, include):
            left_out[name] = reason
        else:
            files[name] = path
    if missing := sorted(({PLAN} | needed) - files.keys()):
        raise HubError(f"{folder} is not whole: its receipt lists files that are not there\n{listing(missing)}")
    evaluation = Evaluation.load(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    notes = []
    if evaluation is not None and (drawn := _plot(evaluation)):
        files[TRADEOFF] = drawn
    elif evaluation is not None:
        notes.append(
            "no picture of the trade-off: matplotlib is not installed, or nothing was measured on both its axes"
        )
    files[CARD], said = _card(
        folder, _restated(receipt, stated), repository, evaluation, TRADEOFF if TRADEOFF in files else None
    )
    return Parcel(files, left_out, (*notes, *said))


def pack_plan(path: Path, repository: str, stated: Mapping[str, Any]) -> Parcel:
    """A plan's file and its card. Raises PlanError where the file is not a plan."""
    plan = EditPlan.load(path)
    receipt = _restated(model_card.plan_receipt(plan, _base_metadata(plan)), stated)
    text = model_card.model_card(receipt, repository=repository)
    return Parcel({PLAN_FILE: path, CARD: text.encode()}, {}, _missing_facts(receipt))


def _stated(base_model: str | None, licence: str | None) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    if base_model is not None:
        reference = read_reference(base_model)
        if reference is None or "/" not in reference.repository:
            raise HubError(f"--base-model is {base_model!r}; expected the base's id on the Hub, user/name")
        stated["base"] = reference
    if licence is not None:
        stated["license"] = licence
    return stated


def _restated(receipt: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    base, taken = dict(receipt["base"]), dict(receipt.get("card") or {})
    if reference := stated.get("base"):
        base |= {"name": reference.repository, "revision": base["revision"] or reference.revision or "main"}
    if "license" in stated:
        taken = {key: value for key, value in taken.items() if not key.startswith("license")}
        taken["license"] = stated["license"]
    return {**receipt, "base": base, "card": taken}


def _reason_to_stay(
    path: Path, name: str, folder: Path, written: list[str], needed: set[str], include: Sequence[str]
) -> str:
    if any(part.startswith(".") for part in PurePosixPath(name).parts):
        return "a hidden file"
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        return "a symbolic link out of the folder"
    if not path.is_file():
        return "no plain file"
    if name in (EVALUATION, REPORT):
        return "holds questions and answers; its numbers are in the card"
    if name in (RECEIPT, CARD) or any(fnmatch(name, pattern) for pattern in include):
        return ""
    if name not in written:
        return "not on the receipt: emit did not write it"
    return "" if name == PLAN or name in needed else "not a file that loading needs"


def _card(
    folder: Path, receipt: Mapping[str, Any], repository: str, evaluation: Evaluation | None, plot: str | None
) -> tuple[bytes, tuple[str, ...]]:
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise HubError(f"cannot read {path}: {error}") from None
    if text is not None and hashlib.sha256(text.encode()).hexdigest() != receipt.get("card_sha256"):
        said = f"{CARD} was changed since it was written, and goes as it is; only the repository's name was filled in"
        return text.replace(HERE, repository).encode(), (said,)
    sections = [] if evaluation is None else card_section.tradeoff(evaluation, plot)
    made = model_card.model_card(receipt, repository=repository, sections=sections)
    return made.encode(), _missing_facts(receipt)


def _missing_facts(receipt: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if receipt["base"]["revision"] is None:
        found.append("the base was a local folder: name it in the card with --base-model user/name")
    if "license" not in receipt["card"]:
        found.append("the base's card names no licence: state one with --license")
    return tuple(found)


def _base_metadata(plan: EditPlan) -> dict[str, Any]:
    """What the base's own card says, if the base is in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if plan.base.revision is None:
        return {}
    found = try_to_load_from_cache(plan.base.name, CARD, revision=plan.base.revision)
    return model_card.base_metadata(Path(found)) if isinstance(found, str) else {}


def _plot(evaluation: Evaluation) -> bytes | None:
    import importlib.util

    if not importlib.util.find_spec("matplotlib"):
        notice("the card has no picture of the trade-off: it needs matplotlib (pip install 'steer2edit[plots]')")
        return None
    from steer2edit.report.tradeoff import tradeoff

    drawing = tradeoff(replace(evaluation, prompts=()), [], {})
    return None if drawing is None else drawing.png()


def _refuse_leaks(parcel: Parcel, source: Path) -> None:
    """Raise Steer2EditError where a text to be sent holds a token, or a path of this machine."""
    from huggingface_hub import get_token

    token = get_token()
    homes = {path for path in (Path.home(), Path.cwd(), source.resolve().parent) if len(path.parts) > 1}
    # as they are, and as JSON writes a backslash
    spellings = {spelling for home in homes for spelling in (str(home), str(home).replace("\\", "\\\\"))}
    # where there is none, a pattern that matches nothing
    paths = re.compile("|".join(rf"{re.escape(spelling)}(?=[\\/\"'\s]|$)" for spelling in sorted(spellings)) or "(?!)")
    problems = []
    for name, content in parcel.files.items():
        try:
            text = text_of(content, name)
        except OSError as error:
            raise Steer2EditError(f"cannot read {name}: {error.strerror or error}") from None
        vocabulary = any(fnmatch(name, pattern) for pattern in _VOCABULARIES)
        kinds = secrets_in(text, vocabulary=vocabulary)
        if token is not None and token in text:
            kinds.insert(0, "your Hugging Face token")
        if kinds:
            problems.append(f"{name} holds an access token, a key or a password: {', '.join(kinds)}")
        if not vocabulary and (found := paths.search(text)):
            where = re.split(r"[\"\s]", text[found.start() : found.start() + 120])[0]
            problems.append(f"{name} holds a path of this machine: {where}")
    if problems:
        raise Steer2EditError(f"nothing was sent; take these out first:\n{listing(problems)}")


def _send(parcel: Parcel, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi, constants

    from steer2edit import __version__

    if constants.HF_HUB_OFFLINE:
        raise HubError("the offline mode forbids to send anything; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE)")
    # RuntimeError: the transfer library's own
    failures: tuple[type[BaseException], ...] = (*hub_errors(), RuntimeError)
    api = HfApi(library_name="steer2edit", library_version=__version__)
    try:
        # without the flag, the account's own default decides
        api.create_repo(repository, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise HubError(
                f"{repository} is there already, and public: make it private on the Hub, or take another name"
            )
        ours = set(parcel.files)
        strange = [name for name in api.list_repo_files(repository) if name not in ours and _is_artefact(name)]
        if strange:
            raise HubError(
                f"{repository} holds files of another artefact, which would lie beside this one:\n{listing(strange)}\n"
                "Delete them there, or take another name."
            )
        with tempfile.TemporaryDirectory() as scratch:
            _stage(parcel, Path(scratch))
            commit = api.upload_folder(
                repo_id=repository, folder_path=scratch, commit_message=f"Upload with steer2edit {__version__}"
            )
    except HubError:
        raise
    except failures as error:
        raise HubError(f"nothing more was sent to {repository}: {explain(error, str(Reference(repository)))}") from None
    return without_passwords(commit.commit_url)


def _is_artefact(name: str) -> bool:
    return PurePosixPath(name).suffix in _WEIGHTS or name in (ADAPTER_CONFIG, INDEX)


def _stage(parcel: Parcel, folder: Path) -> None:
    """A folder of exactly what is to be sent: links to files here, and what was made for the purpose."""
    for name, given in parcel.files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(given, bytes):
            place.write_bytes(given)
            continue
        try:
            place.symlink_to(given.resolve())
        except OSError:  # where links need a privilege
            shutil.copyfile(given, place)
