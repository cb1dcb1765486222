"""Contrast data: reading, validating, and turning it into tokens.

A source is a ``.jsonl``/``.ndjson``, ``.json`` (a list), ``.csv`` or ``.parquet`` file, or a Hub dataset.
A row is ``{"prompt", "positive", "negative"}`` or ``{"prompt", "response", "label"}``; the rest is ignored.
All the problems of a source are reported together.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import importlib.resources
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from steer2edit.errors import DataError, listing

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # its place since Python 3.11

Label = Literal["positive", "negative"]
LABELS: tuple[Label, Label] = ("positive", "negative")
PAIR = ("prompt", "positive", "negative")
LABELLED = ("prompt", "response", "label")
SHAPES = 'expected "prompt", "positive", "negative" or "prompt", "response", "label"'


class Message(NamedTuple):
    """One turn of a chat; a tuple, so that prompts can be compared and hashed."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One response and its class. ``row`` is the source's row, which a pair's two examples share."""

    prompt: Prompt
    response: str
    label: Label
    where: str
    row: int


@dataclass(frozen=True)
class Encoded:
    """Tokens of prompt and response; positions ``[start-1, len(ids)-1)`` predict the response's."""

    ids: tuple[int, ...]
    start: int
    label: Label
    row: int


def read_contrast(source: str | Path) -> list[Example]:
    """Examples from a file, or from a Hub dataset ``user/name`` or ``user/name:file``, in the source's order.

    Raises DataError, which lists every problem with its line or row.
    """
    try:
        path = Path(source).expanduser()
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read {_shown(str(source))}: {error}") from None
    if folder:
        raise DataError(f"{path} is a folder; name a file in it ({', '.join(_READERS)})")
    if exists:
        return _read(path, path.name)
    repo, _, file = str(source).partition(":")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) and PurePosixPath(repo).suffix not in _READERS:
        return _read(*_download(repo, file))
    raise DataError(f"{source} does not exist, and is no Hub dataset (user/name or user/name:file) either")


def behaviors() -> tuple[str, ...]:
    """Names of the built-in behaviours."""
    names = (entry.name for entry in _package_data().iterdir())
    return tuple(sorted(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")))


def load_behavior(name: str) -> list[Example]:
    """Pairs of a built-in behaviour, each prompt as one user message. Raises DataError on an unknown name."""
    known = behaviors()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"there is no built-in behaviour {_shown(name)}; there are {', '.join(known)}.{hint}")
    file = f"{name}.jsonl"
    examples = _parse((_package_data() / file).read_bytes(), file, _json_lines)
    return [replace(e, prompt=(Message("user", e.prompt),)) if isinstance(e.prompt, str) else e for e in examples]


def neutral_text() -> str:
    """Running English text without any of the behaviours, to measure how far an edit moves the model."""
    return (_package_data() / "neutral.txt").read_text(encoding="utf-8")


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over prompts, responses and labels in their order; independent of the file and its format."""
    rows = [(e.prompt if isinstance(e.prompt, str) else _dicts(e.prompt), e.response, e.label) for e in examples]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def render_prompt(prompt: Prompt, tokenizer: Any, system: str | None = None) -> str:
    """The text before the response: by the tokenizer's chat template, or as plain text where it has none.

    Raises DataError if the template rejects or drops what it is given, or if there are two system messages.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not templated:
        return prompt if system is None else f"{system}\n\n{prompt}"
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if system is not None:
        if any(message.role == "system" for message in messages):
            raise DataError("the prompt has a system message of its own, and a system text is given too: keep one")
        messages = (Message("system", system), *messages)
    if not templated:
        turns = [f"{m.role.capitalize()}: {m.content}\n" for m in messages if m.role != "system"]
        return "".join([f"{m.content}\n\n" for m in messages if m.role == "system"] + turns) + "Assistant:"
    remedy = "leave the system text out, or write it into the user's messages"
    try:
        text = tokenizer.apply_chat_template(_dicts(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises: Jinja's errors, TypeError, ValueError
        roles = ", ".join(message.role for message in messages)
        advice = f"; {remedy}" if "system" in roles else "; check the order and the names of the roles"
        raise DataError(f"the chat template rejects messages with roles {roles} ({error}){advice}") from None
    for message in messages:
        if message.role == "system" and message.content.strip() not in text:
            raise DataError(f"the chat template drops the system message; {remedy}")
    return str(text)


def encode(
    examples: Sequence[Example], tokenizer: Any, *, system: str | None = None, max_tokens: int = 2048
) -> list[Encoded]:
    """Tokens and response span of each example, in order, cut at ``max_tokens``.

    A token that merges the prompt's end with the response's beginning counts as the response's. Raises
    DataError, listing every prompt that cannot be rendered or is too long, and every response without a
    token.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))
    texts: dict[Prompt, str] = {}
    problems: list[str] = []
    for example in examples:
        if example.prompt not in texts:
            try:
                texts[example.prompt] = render_prompt(example.prompt, tokenizer, system)
            except DataError as error:
                texts[example.prompt] = ""
                problems.append(f"{example.where}: {error}")
    if problems:
        raise DataError(f"prompts that cannot be rendered:\n{listing(problems)}")
    wholes = [_joined(texts[e.prompt], e.response, templated) for e in examples]
    # A template writes its own special tokens; adding the tokenizer's would double the first one.
    prompt_ids = dict(zip(texts, _tokenize(list(texts.values()), tokenizer, not templated), strict=True))
    encoded: list[Encoded] = []
    for example, ids in zip(examples, _tokenize(wholes, tokenizer, not templated), strict=True):
        start = max(1, _common_prefix(prompt_ids[example.prompt], ids))
        if start >= len(ids):
            problems.append(f"{example.where}: the response {_shown(example.response)} yields no token")
        elif start >= max_tokens:
            problems.append(
                f"{example.where}: the prompt alone takes {start} tokens and the limit is {max_tokens};"
                " shorten it or raise the limit"
            )
        else:
            encoded.append(Encoded(tuple(ids[:max_tokens]), start, example.label, example.row))
    if problems:
        raise DataError(f"examples that cannot be encoded:\n{listing(problems)}")
    return encoded


def _joined(prompt: str, response: str, templated: bool) -> str:
    spaced = templated or not prompt or prompt[-1].isspace() or response[0].isspace()
    return prompt + response if spaced else f"{prompt} {response}"


def _tokenize(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # The probe in front shows whether the tokenizer closes every text with an end-of-sequence token.
    batch = tokenizer(["a", *texts], add_special_tokens=special, return_attention_mask=False, verbose=False)
    probe, *found = batch["input_ids"]
    closed = special and tokenizer.eos_token_id is not None and probe[-1] == tokenizer.eos_token_id
    return [list(ids[:-1] if closed else ids) for ids in found]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _dicts(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def _package_data() -> Traversable:
    return importlib.resources.files("steer2edit") / "behaviors"


def _download(repo: str, file: str) -> tuple[Path, str]:
    """The local copy of a dataset's file and its name in messages; the only file, if none is named."""
    import huggingface_hub

    try:
        if not file:
            held = huggingface_hub.list_repo_files(repo, repo_type="dataset")
            found = [name for name in sorted(held) if _is_data(PurePosixPath(name))]
            if not found:
                raise DataError(f"the dataset {repo} on the Hub holds no file in a format of {', '.join(_READERS)}")
            if len(found) > 1:
                raise DataError(
                    f"the dataset {repo} on the Hub holds several data files; name one as {repo}:{found[0]}\n"
                    f"{listing(found)}"
                )
            file = found[0]
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")), f"{repo}:{file}"
    except DataError:
        raise
    except Exception as error:  # its errors have no base in common over the supported versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot read {repo}{':' * bool(file)}{file}: no such file here, and the Hub says: {reason}"
        ) from None


def _is_data(path: PurePosixPath) -> bool:
    return path.suffix.lower() in _READERS and path.name not in ("dataset_info.json", "dataset_infos.json")


# A reader yields each row with its place, and notes what it cannot read.
_Reader = Callable[[bytes, str, list[str]], Iterator[tuple[str, object]]]


def _read(path: Path, name: str) -> list[Example]:
    reader = _READERS.get(PurePosixPath(name).suffix.lower())
    if reader is None:
        raise DataError(f"{name} is in no known format; expected a name that ends in {', '.join(_READERS)}")
    try:
        return _parse(path.read_bytes(), name, reader)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from None


def _parse(data: bytes, name: str, reader: _Reader) -> list[Example]:
    problems: list[str] = []
    examples: list[Example] = []
    rows = 0
    data = data.removeprefix(codecs.BOM_UTF8)
    for where, row in reader(data, name, problems):
        examples += _examples(row, where, rows, problems)
        rows += 1
    if not data.strip():
        problems = [f"{name} is empty"]
    elif not rows and not problems:
        problems = [f"{name} holds no rows; {SHAPES}"]
    elif not problems:
        missing = [label for label in LABELS if all(e.label != label for e in examples)]
        problems = [f"{name} holds no {label} example; both classes are needed" for label in missing]
    if problems:
        raise DataError(f"{name} cannot be used as contrast data:\n{listing(problems)}")
    return examples


def _json_lines(data: bytes, name: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{name} line {number}"
        if line.strip():
            try:
                yield where, json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: {_reason(error)}")


def _json_list(data: bytes, name: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    text = _decoded(data, name, problems)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "; one object a line is .jsonl" if "Extra data" in str(error) else ""
        problems.append(f"{name}{line}: {_reason(error)}{hint}")
        return
    if isinstance(rows, list):
        yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, start=1))
    else:
        problems.append(f"{name}: expected a list of rows, found {_shown(rows)}")


def _csv(data: bytes, name: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses a long response; the limit is the whole process's
    try:
        reader = csv.reader(io.StringIO(_decoded(data, name, problems), newline=""), strict=True)
        line, header = 1, None
        try:
            for cells in reader:
                where, line = f"{name} line {line}", reader.line_num + 1
                if not any(cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    if twice := sorted({k for k in PAIR + LABELLED if header.count(k) > 1}):
                        problems.append(f"{where}: column {', '.join(twice)} occurs twice")
                        return
                    if missing := _missing(header):
                        problems.append(f"{where} (the header): {missing}")
                        return
                elif len(cells) != len(header):
                    problems.append(f"{where}: expected {len(header)} cells as in the header, found {len(cells)}")
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            problems.append(f"{name} line {line}: {error}")
    finally:
        csv.field_size_limit(limit)


def _parquet(data: bytes, name: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    if not data:
        return
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        problems.append(f"{name}: Parquet needs pyarrow; install it with: pip install 'steer2edit[parquet]'")
        return
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        columns = [column for column in file.schema_arrow.names if column in PAIR + LABELLED]
        if missing := _missing(file.schema_arrow.names):
            problems.append(f"{name}: {missing}")
            return
        rows = file.read(columns=columns).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        problems.append(f"{name}: {_reason(error)}")
        return
    yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, start=1))


_READERS: dict[str, _Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _decoded(data: bytes, name: str, problems: list[str]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(f"{name} line {line}: {_reason(error)}")
        return ""


def _examples(row: object, where: str, index: int, problems: list[str]) -> list[Example]:
    """The one or two examples of a row; none, and a note for each fault, if it has any."""
    if not isinstance(row, dict):
        problems.append(f"{where}: expected an object, found {_shown(row)}")
        return []
    if missing := _missing(row):
        problems.append(f"{where}: {missing}")
        return []
    pair = all(key in row for key in PAIR)
    faults = [_prompt_fault(row["prompt"])]
    faults += [_text_fault(key, row[key], filled=True) for key in (PAIR[1:] if pair else ("response",))]
    if not pair and row["label"] not in LABELS:
        faults.append(f'label is {_shown(row["label"])}; expected "positive" or "negative"')
    found = [f"{where}: {fault}" for fault in faults if fault]
    problems += found
    if found:
        return []
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(Message(message["role"], message["content"]) for message in prompt)
    responses = [(row[label], label) for label in LABELS] if pair else [(row["response"], row["label"])]
    return [Example(prompt, response, label, where, index) for response, label in responses]


def _missing(keys: Iterable[str]) -> str:
    held = list(keys)
    if any(all(key in held for key in shape) for shape in (PAIR, LABELLED)):
        return ""
    nearest = max((PAIR, LABELLED), key=lambda shape: sum(key in held for key in shape[1:]))
    if not any(key in held for key in nearest[1:]):
        return f"{SHAPES}, found {_shown(held)}"
    absent = ", ".join(json.dumps(key) for key in nearest if key not in held)
    return f"{absent} is missing; {SHAPES}"


def _prompt_fault(prompt: object) -> str:
    if isinstance(prompt, str):
        return _text_fault("prompt", prompt)
    if not isinstance(prompt, list):
        return f"prompt: expected a string or a list of chat messages, found {_shown(prompt)}"
    if not prompt:
        return "prompt: the list of chat messages is empty"
    for i, message in enumerate(prompt, start=1):
        if not isinstance(message, dict):
            return f'prompt, message {i}: expected {{"role", "content"}}, found {_shown(message)}'
        for key in Message._fields:
            if key not in message:
                return f'prompt, message {i}: "{key}" is missing'
            if fault := _text_fault(key, message[key], filled=key == "role"):
                return f"prompt, message {i}: {fault}"
    return ""


def _text_fault(key: str, value: object, filled: bool = False) -> str:
    if not isinstance(value, str):
        return f"{key}: expected a string, found {_shown(value)}"
    if filled and not value.strip():
        return f"{key} is empty" if not value else f"{key} holds nothing but white space"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"{key} holds half of a surrogate pair, which is no character"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg} at column {error.colno}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shown(value: object) -> str:
    """A value for a message: as JSON, its beginning only."""
    if isinstance(value, str):
        value = value[:60] + "…" * (len(value) > 60)
    elif isinstance(value, (list, tuple)):
        value = list(value[:8])
    elif isinstance(value, dict):
        return f"an object with {len(value)} keys"
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 80 else f"{text[:80]}…"
