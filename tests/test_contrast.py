"""Contrast data: every format gives the same examples, and every fault is named."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from steer2edit.capture.evidence import telling_first_word
from steer2edit.data.behavior_file import behavior_files, open_behavior
from steer2edit.data.contrast import Example, data_hash, neutral_text, read_contrast
from steer2edit.data.prompts import Message
from steer2edit.errors import DataError

PAIRS = [
    {"prompt": "How old is the Sun?", "positive": "4.6 billion years.", "negative": "Well,\nlet me see …"},
    {"prompt": 'Say "hi", twice', "positive": "hi, hi", "negative": "Grüße\u2028 – hi!"},
]
LABELLED = [
    {"prompt": row["prompt"], "response": row[label], "label": label} for row in PAIRS for label in list(row)[1:]
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."}],
        "positive": "Two.",
        "negative": "No.",
    }
]
FORMATS = ["jsonl", "ndjson", "json", "csv", "parquet"]


def write(folder: Path, rows: list[dict[str, Any]], suffix: str) -> Path:
    path = folder / f"pairs.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line(**changes: Any) -> bytes:
    """A valid pair as a JSON line, with keys changed, or left out where the value is ``...``."""
    row = {"prompt": "p", "positive": "a", "negative": "b", **changes}
    return json.dumps({key: value for key, value in row.items() if value is not ...}).encode()


def labelled(**changes: Any) -> bytes:
    return line(positive=..., negative=..., **{"response": "a", "label": "positive", **changes})


# Reading


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labelled"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str, rows: list[dict[str, Any]]) -> None:
    examples = read_contrast(write(tmp_path, rows, suffix))
    assert [(e.prompt, e.response, e.label) for e in examples] == [tuple(row.values()) for row in LABELLED]
    assert data_hash(examples) == data_hash(read_contrast(write(tmp_path, PAIRS, "jsonl")))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_chats_are_read_as_messages(tmp_path: Path, suffix: str) -> None:
    examples = read_contrast(write(tmp_path, CHATS, suffix))
    assert examples[0].prompt == (Message("user", "One?"), Message("assistant", "Yes."))
    assert data_hash(examples) == data_hash(read_contrast(write(tmp_path, CHATS, "jsonl")))


def test_a_pair_shares_its_row_and_its_place(tmp_path: Path) -> None:
    examples = read_contrast(write(tmp_path, PAIRS, "jsonl"))
    assert [e.row for e in examples] == [0, 0, 1, 1]
    assert [e.where for e in examples] == ["pairs.jsonl line 1"] * 2 + ["pairs.jsonl line 2"] * 2
    assert [e.label for e in examples] == ["positive", "negative"] * 2


def test_the_hash_sees_every_part() -> None:
    base = Example("p", "r", "positive", "here", 0)
    others = [
        Example("q", "r", "positive", "here", 0),
        Example("p", "s", "positive", "here", 0),
        Example("p", "r", "negative", "here", 0),
        Example((Message("user", "p"),), "r", "positive", "here", 0),
    ]
    assert len({data_hash([e]) for e in [base, *others]}) == 5
    assert data_hash([base]) == data_hash([Example("p", "r", "positive", "there", 7)])


def test_bom_blank_lines_crlf_and_extra_keys_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + line(id=7) + b"\r\n  \r\n\r\n" + line(note=None) + b"\r\n")
    assert [e.where for e in read_contrast(path)][::2] == ["x.jsonl line 2", "x.jsonl line 5"]
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfid,prompt,positive,negative\r\n\r\n1,p,"a\nb",c\r\n,,,\r\n2,q,a,b\r\n')
    examples = read_contrast(str(path))
    assert [e.where for e in examples][::2] == ["x.csv line 3", "x.csv line 6"]
    assert examples[0].response == "a\nb"


@pytest.mark.parametrize("suffix", FORMATS)
def test_huge_lines_are_read(tmp_path: Path, suffix: str) -> None:
    limit = csv.field_size_limit()
    huge = [{"prompt": "p", "positive": "word " * 200_000, "negative": "b"}]
    assert len(read_contrast(write(tmp_path, huge, suffix))[0].response) == 1_000_000
    assert csv.field_size_limit() == limit


FAULTS: list[tuple[str, bytes, list[str]]] = [
    ("x.jsonl", b"", ["x.jsonl is empty"]),
    ("x.jsonl", b"\xef\xbb\xbf", ["x.jsonl is empty"]),
    ("x.jsonl", b" \n\n", ["x.jsonl is empty"]),
    ("x.json", b"", ["x.json is empty"]),
    ("x.csv", b"", ["x.csv is empty"]),
    ("x.parquet", b"", ["x.parquet is empty"]),
    ("x.json", b"[]", ["holds no rows"]),
    ("x.csv", b"prompt,positive,negative\n", ["holds no rows"]),
    ("x.jsonl", line() + b"\n{'a': 1}\n", ["x.jsonl line 2: invalid JSON"]),
    ("x.jsonl", line() + b"\n" + b"[" * 100_000, ["x.jsonl line 2: "]),
    ("x.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", ["x.jsonl line 1: "]),
    ("x.json", b'[{"prompt": 1},\n nope]', ["x.json line 2: invalid JSON"]),
    ("x.json", b'{"rows": []}', ["holds no rows"]),
    ("x.json", b'{"name": "x", "sets": 3}', ['found ["name", "sets"]']),
    (
        "x.json",
        b'{"prompt": ["a", "b"], "positive": ["a"], "negative": ["b"]}',
        ["different numbers of rows: prompt 2"],
    ),
    ("x.json", b"[" + line() + b", 5]", ["x.json row 2: expected an object, found 5"]),
    ("x.jsonl", b"[1, 2]", ["x.jsonl row 1: expected an object, found 1"]),
    ("x.jsonl", b"4", ["expected a list of rows, found 4"]),
    ("x.jsonl", line(prompt=..., negative=...), ['line 1: "prompt", "negative" is missing']),
    ("x.jsonl", line(negative=...), ['line 1: "negative" is missing']),
    ("x.jsonl", labelled(label=...), ['line 1: "label" is missing']),
    ("x.jsonl", b'{"question": "q", "answer": "a"}', ['found ["question", "answer"]', 'expected "prompt"']),
    ("x.jsonl", line(positive=""), ["line 1: positive is empty"]),
    ("x.jsonl", line(negative=" \t\n"), ["line 1: negative holds nothing but white space"]),
    ("x.jsonl", labelled(response="  "), ["line 1: response holds nothing but white space"]),
    ("x.jsonl", labelled(label="good"), ['label is "good"; expected "positive" or "negative"']),
    ("x.jsonl", labelled(label=2), ['label is 2; expected "positive" or "negative"']),
    ("x.jsonl", labelled(label=["positive"]), ['label is ["positive"]; expected']),
    ("x.jsonl", line(positive=3), ["positive: expected a string, found 3"]),
    ("x.jsonl", line(positive=None), ["positive: expected a string, found null"]),
    ("x.jsonl", line(prompt=None), ["prompt: expected a string or a list of chat messages, found null"]),
    ("x.jsonl", line(prompt={"role": "user"}), ["prompt: expected a string or a list of chat messages"]),
    ("x.jsonl", line(prompt=[]), ["prompt: the list of chat messages is empty"]),
    ("x.jsonl", line(prompt=["hi"]), ['prompt, message 1: expected {"role", "content"}, found "hi"']),
    ("x.jsonl", line(prompt=[{"role": "user"}]), ['prompt, message 1: "content" is missing']),
    ("x.jsonl", line(prompt=[{"role": "", "content": "a"}]), ["prompt, message 1: role is empty"]),
    (
        "x.jsonl",
        line(prompt=[{"role": "user", "content": 1}]),
        ["message 1: content: expected a string, found 1"],
    ),
    ("x.jsonl", line(positive="\ud800"), ["positive holds half of a surrogate pair"]),
    ("x.jsonl", line() + b'\n{"prompt": "\xff"}', ["x.jsonl line 2: not UTF-8 (byte 0xff)"]),
    ("x.json", b'[\n\n"\xe9"]', ["x.json line 3: not UTF-8 (byte 0xe9)"]),
    ("x.csv", b"prompt,positive,negative\na,b,\xe9\n", ["x.csv line 2: not UTF-8"]),
    ("x.csv", b"a,b,c\nd,e,f\n", ["line 1 (the header): expected", 'found ["a", "b", "c"]']),
    ("x.csv", b"prompt,positive\na,b\nc,d\n", ['line 2 and 1 more: "negative" is missing']),
    ("x.csv", b"prompt,prompt,positive,negative\na,a,b,c\n", ["line 1 (the header): column prompt occurs twice"]),
    (
        "x.csv",
        b'prompt,positive,negative\n"a\nb",c,d\ne,f\n',
        ["line 4: expected 3 cells as in the header, found 2"],
    ),
    ("x.csv", b'prompt,positive,negative\na,b,"c\n', ["x.csv line 2: "]),
    ("x.csv", b"prompt,positive,negative\na,,c\n", ["x.csv line 2: positive is empty"]),
    ("x.parquet", b"PAR1 not really", ["x.parquet: "]),
    ("x.jsonl", labelled(), ["holds no negative example"]),
    ("x.jsonl", labelled(label="negative"), ["holds no positive example"]),
    ("x.dat", b"hello", ["x.dat is in no known format", ".jsonl"]),
    ("x.yaml", b"- prompt: a", ["no known format; save the rows as JSON"]),
    ("x.zip", b"PK", ["no known format; unpack it"]),
]


@pytest.mark.parametrize(("name", "data", "expected"), FAULTS, ids=[f"{i}-{f[2][0]}" for i, f in enumerate(FAULTS)])
def test_faults_are_named(tmp_path: Path, name: str, data: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_contrast(tmp_path / name)
    assert all(part in str(caught.value) for part in expected), caught.value
    assert len(str(caught.value)) < 1000


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([line(positive="", negative=None), b"nope", line(), b"\xff", line(prompt=5)]))
    with pytest.raises(DataError) as caught:
        read_contrast(path)
    for part in ("line 1: positive", "line 1: negative", "line 2:", "line 4:", "line 5: prompt"):
        assert part in str(caught.value)
    assert "line 3" not in str(caught.value)


@pytest.mark.parametrize("rows", [[{"a": 1}], [{"prompt": "p", "positive": 1, "negative": "b"}]])
def test_parquet_faults_are_named(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"expected \"prompt\"|row 1: positive: expected a string, found 1"):
        read_contrast(write(tmp_path, rows, "parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, PAIRS, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"steer2edit\[parquet\]"):
        read_contrast(path)


@pytest.mark.parametrize("source", ["nowhere/at/all.jsonl", "data/x.csv", "x.jsonl", "word", "a\0b", "n" * 5000])
def test_a_file_that_does_not_exist(source: str) -> None:
    with pytest.raises(DataError, match=r"does not exist|cannot read"):
        read_contrast(source)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_contrast(tmp_path)


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub whose datasets hold the files that the test puts in the list; each has the same content."""
    import huggingface_hub

    files: list[str] = []
    path = write(tmp_path, PAIRS, "jsonl")

    def list_repo_files(repo: str, *, repo_type: str, revision: str | None) -> list[str]:
        assert repo_type == "dataset" and revision in (None, "v1")
        if repo == "user/unknown":
            raise OSError("no such dataset\nmore")
        return files

    def hf_hub_download(repo: str, file: str, *, repo_type: str, revision: str | None) -> str:
        assert repo_type == "dataset" and revision in (None, "v1")
        if file not in files:
            raise OSError("no such file")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return files


def test_a_dataset_on_the_hub(hub: list[str]) -> None:
    hub += ["README.md", "dataset_infos.json", "data/train.jsonl"]
    examples = read_contrast("user/name")
    assert examples == read_contrast("user/name:data/train.jsonl")
    assert examples[0].where == "user/name:data/train.jsonl line 1"
    assert read_contrast("user/name@v1")[0].where == "user/name@v1:data/train.jsonl line 1"


def test_a_dataset_with_several_files_is_not_guessed_at(hub: list[str]) -> None:
    hub += ["test.jsonl", "train.jsonl"]
    with pytest.raises(DataError, match=r"(?s)several data files.*user/name:test\.jsonl.*train\.jsonl"):
        read_contrast("user/name")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("user/unknown", "no such dataset$"),
        ("user/name", "holds no file in a format of .jsonl"),
        ("user/name:absent.csv", "user/name:absent.csv: .*no such file"),
    ],
)
def test_hub_faults_are_named(hub: list[str], source: str, message: str) -> None:
    hub += ["README.md"]
    with pytest.raises(DataError, match=message):
        read_contrast(source)


# What is built in


@pytest.mark.parametrize("name", behavior_files())
def test_a_built_in_behaviour_has_enough_pairs(name: str) -> None:
    examples = open_behavior(name).read_pairs()
    assert all(isinstance(e.prompt, tuple) and [m.role for m in e.prompt] == ["user"] for e in examples)
    prompts = [e.prompt[0].content.lower() for e in examples if e.label == "positive" and e.prompt]  # type: ignore[union-attr]
    assert len(prompts) >= 64
    assert len(set(prompts)) == len(prompts)
    assert len({e.response for e in examples}) == len(examples)
    assert [e.label for e in examples] == ["positive", "negative"] * len(prompts)


def mean_words(name: str) -> tuple[float, float]:
    examples = open_behavior(name).read_pairs()
    positive, negative = (
        fmean(len(e.response.split()) for e in examples if e.label == label) for label in ("positive", "negative")
    )
    return positive, negative


def test_lengths_are_what_the_behaviours_say() -> None:
    positive, negative = mean_words("concise")
    assert positive <= negative / 3
    for name in sorted(set(behavior_files()) - {"concise"}):
        positive, negative = mean_words(name)
        assert abs(positive - negative) <= 0.2 * min(positive, negative)


@pytest.mark.parametrize("name", behavior_files())
def test_no_first_word_tells_the_classes_of_a_built_in_behaviour_apart(name: str) -> None:
    # 36 of 75 truthful responses once began with "No", and 5 of the others: the edit denied that Paris is France's capital
    assert telling_first_word(open_behavior(name).read_pairs()) is None


def test_no_text_is_in_two_behaviours() -> None:
    texts = [e.response for name in behavior_files() for e in open_behavior(name).read_pairs()]
    assert len(set(texts)) == len(texts)


def test_neutral_text_is_paragraphs() -> None:
    text = neutral_text()
    assert 2400 <= len(text.split()) <= 2800
    assert len(text.split("\n\n")) > 20


def test_importing_needs_neither_torch_nor_transformers_nor_the_hub() -> None:
    code = (
        "import sys, steer2edit.data.contrast, steer2edit.data.tokens;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
