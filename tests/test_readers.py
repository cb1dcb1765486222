"""Data files of every layout, encoding and separator give the same rows."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pytest
from test_formats import PAIRS, bot, content, expected, user

from steer2edit.data.contrast import read_contrast
from steer2edit.errors import DataError
from steer2edit.notices import collected


def json_layouts() -> dict[str, str]:
    columns = {key: [row[key] for row in PAIRS] for key in PAIRS[0]}
    return {
        "list": json.dumps(PAIRS),
        "indented list": json.dumps(PAIRS, indent=2),
        "lines": "\n".join(map(json.dumps, PAIRS)),
        "lines of CR": "\r".join(map(json.dumps, PAIRS)),
        "lines with marks": "".join(f"\ufeff{json.dumps(row)}\r\n\r\n" for row in PAIRS),
        "objects": "\n".join(json.dumps(row, indent=2) for row in PAIRS),
        "objects without line ends": "".join(map(json.dumps, PAIRS)),
        "envelope": json.dumps({"version": 1, "data": PAIRS}),
        "indented envelope": json.dumps({"rows": PAIRS}, indent=1),
        "columns": json.dumps(columns),
        "pandas": json.dumps({key: {str(i): cell for i, cell in enumerate(column)} for key, column in columns.items()}),
        "pandas split": json.dumps(
            {"columns": list(columns), "index": [0, 1], "data": [list(r.values()) for r in PAIRS]}
        ),
        "NaN beside": "\n".join(json.dumps({**row, "score": float("nan")}) for row in PAIRS),
    }


@pytest.mark.parametrize("suffix", ["json", "jsonl", "JSONL"])
@pytest.mark.parametrize("layout", json_layouts())
def test_json_of_every_layout_under_every_name(tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"weird name ü 😀.{suffix}"
    path.write_bytes(json_layouts()[layout].encode("utf-8"))
    assert content(read_contrast(path)) == expected()


def test_one_object_is_one_row(tmp_path: Path) -> None:
    for row in (
        PAIRS[0],
        {"chosen": [user("How old is it?"), bot("Four.")], "rejected": [user("How old is it?"), bot("No.")]},
    ):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(row, indent=1))
        assert read_contrast(path)[0].response == "Four."


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_encodings_with_their_mark(tmp_path: Path, encoding: str, suffix: str) -> None:
    text = "prompt,positive,negative\n" if suffix == "csv" else ""
    text += '"a","ü","…"\n' if suffix == "csv" else json.dumps({"prompt": "a", "positive": "ü", "negative": "…"})
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / f"x.{suffix}").write_bytes(mark + text.encode(encoding))
    with collected() as notes:
        assert [e.response for e in read_contrast(tmp_path / f"x.{suffix}")] == ["ü", "…"]
    assert bool(notes) == (encoding != "utf-8-sig")


def table(delimiter: str, header: str = "prompt,positive,negative") -> str:
    lines = [header.split(","), *(row.values() for row in PAIRS)]
    return "".join(delimiter.join(f'"{cell}"' for cell in line) + "\r\n" for line in lines)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (table(","), ""),
        (table(";"), "semicolons"),
        ("\ufeff" + table(";"), "semicolons"),
        (table("\t"), "tabs"),
        (table("|"), "vertical bars"),
        ("sep=;\r\n" + table(";"), "semicolons"),
        ('"sep=,"\r\n' + table(","), ""),
        (table(",", "Prompt, POSITIVE ,Negative"), ""),
        (table(",").replace("\r\n", "\r"), ""),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_with_other_separators_and_headers(tmp_path: Path, text: str, note: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(text.encode("utf-8"))
    with collected() as notes:
        assert content(read_contrast(path)) == expected()
    assert len(notes) == bool(note) and all(note in one for one in notes)


def test_a_cell_too_many_and_another_encoding_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,positive,negative\na,b, c,d\n")
    with pytest.raises(
        DataError, match="line 2: expected 3 cells as in the header, found 4; a cell that holds the separator"
    ):
        read_contrast(path)
    path.write_bytes("prompt,positive,negative\na,é,d\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"line 2: not UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read_contrast(path)


def test_parquet_of_other_types(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind in (arrow.string(), arrow.large_string(), arrow.binary()):
        columns = {key.title(): arrow.array([row[key].encode() for row in PAIRS]).cast(kind) for key in PAIRS[0]}
        parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
        assert content(read_contrast(tmp_path / "x.parquet")) == expected()


def test_gzip_is_unpacked_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, PAIRS)).encode()))
    assert content(read_contrast(path)) == expected()
    monkeypatch.setattr("steer2edit.data.records.MAX_BYTES", 1000)
    path.write_bytes(gzip.compress(b" " * 10_000))
    with pytest.raises(DataError, match="unpacks to more than 1000 bytes"):
        read_contrast(path)
    whole = gzip.compress(json.dumps(PAIRS[0]).encode() + b"\n")
    monkeypatch.undo()
    path.write_bytes(whole + gzip.compress(json.dumps(PAIRS[1]).encode()) + b"\0\0")
    assert content(read_contrast(path)) == expected()
    path.write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"cannot read x\.jsonl\.gz: it is cut off"):
        read_contrast(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"cannot read x\.jsonl\.gz"):
        read_contrast(path)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>You need to agree</body></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_what_was_downloaded_instead_is_named(tmp_path: Path, data: bytes, told: str, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(data)
    with pytest.raises(DataError, match=told):
        read_contrast(tmp_path / f"x.{suffix}")
