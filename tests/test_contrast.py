"""Contrast data: every format gives the same examples, every fault is named, and spans cover the response."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from steer2edit.contrast import (
    Example,
    Message,
    behaviors,
    data_hash,
    encode,
    load_behavior,
    neutral_text,
    read_contrast,
    render_prompt,
)
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
    ("x.json", line() + b"\n" + line(), ["invalid JSON", "one object a line is .jsonl"]),
    ("x.json", b'{"rows": []}', ["expected a list of rows, found an object"]),
    ("x.json", b"[" + line() + b", 5]", ["x.json row 2: expected an object, found 5"]),
    ("x.jsonl", b"[1, 2]", ["x.jsonl line 1: expected an object, found [1, 2]"]),
    ("x.jsonl", b'"text"', ['line 1: expected an object, found "text"']),
    ("x.jsonl", line(prompt=...), ['line 1: "prompt" is missing']),
    ("x.jsonl", line(negative=...), ['line 1: "negative" is missing']),
    ("x.jsonl", labelled(label=...), ['line 1: "label" is missing']),
    ("x.jsonl", b'{"question": "q", "answer": "a"}', ['found ["question", "answer"]', 'expected "prompt"']),
    ("x.jsonl", line(positive=""), ["line 1: positive is empty"]),
    ("x.jsonl", line(negative=" \t\n"), ["line 1: negative holds nothing but white space"]),
    ("x.jsonl", labelled(response="  "), ["line 1: response holds nothing but white space"]),
    ("x.jsonl", labelled(label="good"), ['label is "good"; expected "positive" or "negative"']),
    ("x.jsonl", labelled(label=1), ['label is 1; expected "positive" or "negative"']),
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
    ("x.csv", b"prompt;positive;negative\na;b;c\n", ["line 1 (the header)", "prompt;positive;negative"]),
    ("x.csv", b"prompt,positive\na,b\n", ['line 1 (the header): "negative" is missing']),
    ("x.csv", b"prompt,prompt,positive,negative\na,a,b,c\n", ["line 1: column prompt occurs twice"]),
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
    ("x.txt", b"hello", ["x.txt is in no known format", ".jsonl"]),
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

    def list_repo_files(repo: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        if repo == "user/unknown":
            raise OSError("no such dataset\nmore")
        return files

    def hf_hub_download(repo: str, file: str, *, repo_type: str) -> str:
        assert repo_type == "dataset"
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


# Tokens

SYSTEM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + SYSTEM_TEMPLATE
)
DROPS_SYSTEM = SYSTEM_TEMPLATE.replace("in messages", "in messages if m.role != 'system'")


def make_tokenizer(template: str | None = None, bos: bool = True, eos: bool = False) -> Any:
    """Bytes as tokens, with one merge, of a space and "y"."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "Ġy"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("Ġ", "y")]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> " * bos + "$A" + " </s>" * eos, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def example(prompt: Any = "Is it?", response: str = "Yes.", label: Any = "positive", row: int = 0) -> Example:
    return Example(prompt, response, label, f"x.jsonl line {row + 1}", row)


CHAT = (Message("user", "Is it?"), Message("assistant", "No."), Message("user", "Really?"))


@pytest.mark.parametrize(
    "prompt",
    ["Is it?", "Ist es schön? ", "", "a\n\n", CHAT],
    ids=["text", "space", "empty", "newlines", "chat"],
)
@pytest.mark.parametrize("response", ["Yes.", "yes", " yes", "ünïcode 🙂"])
@pytest.mark.parametrize("template", [None, SYSTEM_TEMPLATE], ids=["plain", "templated"])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_span_decodes_to_the_response(
    prompt: Any, response: str, template: str | None, eos: bool, system: str | None
) -> None:
    tokenizer = make_tokenizer(template, eos=eos)
    (found,) = encode([example(prompt, response)], tokenizer, system=system)
    before = render_prompt(prompt, tokenizer, system)
    assert tokenizer.decode(found.ids[found.start :]).strip() == response.strip()
    assert tokenizer.decode(found.ids, skip_special_tokens=True).startswith(before.removeprefix("<s>"))
    assert found.ids.count(0) == 1, "one BOS"
    assert found.ids[0] == 0
    assert 1 not in found.ids, "no EOS"
    assert system is None or system in before


def test_a_token_merged_across_the_boundary_is_the_responses() -> None:
    tokenizer = make_tokenizer()
    (merged,), (apart,) = (encode([example("Is it? ", response)], tokenizer) for response in ("yes", "no"))
    assert tokenizer.decode(merged.ids[merged.start :]) == " yes"
    assert tokenizer.decode(apart.ids[apart.start :]) == "no"
    assert merged.start == apart.start - 1


def test_plain_text_is_joined_by_one_space_at_most() -> None:
    tokenizer = make_tokenizer(bos=False)
    cases = {
        ("a", "b"): "a b",
        ("a ", "b"): "a b",
        ("a", " b"): "a b",
        ("a\n", "b"): "a\nb",
        ("", "bc"): "bc",
    }
    for (prompt, response), whole in cases.items():
        (found,) = encode([example(prompt, response)], tokenizer)
        assert tokenizer.decode(found.ids) == whole


def test_an_eos_in_the_response_itself_is_kept() -> None:
    for eos in (False, True):
        (found,) = encode([example(response="Yes.</s>")], make_tokenizer(eos=eos))
        assert found.ids.count(1) == 1


def test_chats_without_a_template() -> None:
    tokenizer = make_tokenizer()
    assert render_prompt("p", tokenizer) == "p"
    assert render_prompt("p", tokenizer, "s") == "s\n\np"
    turns = "User: Is it?\nAssistant: No.\nUser: Really?\nAssistant:"
    assert render_prompt(CHAT, tokenizer) == turns
    assert render_prompt(CHAT, tokenizer, "s") == f"s\n\n{turns}"
    assert render_prompt((Message("system", "s"), *CHAT), tokenizer) == f"s\n\n{turns}"


def test_a_string_prompt_is_one_user_message() -> None:
    tokenizer = make_tokenizer(SYSTEM_TEMPLATE)
    assert render_prompt("p", tokenizer) == render_prompt((Message("user", "p"),), tokenizer)
    assert render_prompt("p", tokenizer, "s") == "<s>[system] s\n[user] p\n[assistant] "


@pytest.mark.parametrize(
    ("template", "prompt", "system", "message"),
    [
        (
            NO_SYSTEM,
            "p",
            "s",
            r"line 3: the chat template rejects .*System role not supported.*leave the system",
        ),
        (NO_SYSTEM, (Message("system", "s"), *CHAT), None, "rejects messages with roles system, user"),
        (DROPS_SYSTEM, "p", "Be brief.", "line 3: the chat template drops the system message; leave"),
        (SYSTEM_TEMPLATE, (Message("system", "t"), *CHAT), "s", "line 3: .*keep one"),
        (None, (Message("system", "t"), *CHAT), "s", "line 3: .*keep one"),
        (
            "{{ raise_exception('roles must alternate') }}",
            CHAT,
            None,
            "roles must alternate.*check the order",
        ),
        ("{{ 1 + 'a' }}", CHAT, None, "the chat template rejects"),
    ],
    ids=["refused", "refused-own", "dropped", "two", "two-plain", "roles", "broken"],
)
def test_prompts_that_cannot_be_rendered(template: str | None, prompt: Any, system: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode([example(prompt, row=2)], make_tokenizer(template), system=system)


def test_long_responses_are_cut_and_long_prompts_refused() -> None:
    tokenizer = make_tokenizer()
    (whole,) = encode([example(response="Yes, of course.")], tokenizer)
    (cut,) = encode([example(response="Yes, of course.")], tokenizer, max_tokens=whole.start + 3)
    assert cut.ids == whole.ids[: whole.start + 3]
    assert cut.start == whole.start
    rows = [example(row=0), example("long " * 50, row=1), example(row=2), example("long " * 60, row=3)]
    with pytest.raises(DataError, match=r"(?s)line 2: the prompt alone takes 251 tokens.*line 4") as caught:
        encode(rows, tokenizer, max_tokens=100)
    assert "line 1:" not in str(caught.value)
    with pytest.raises(DataError, match="line 1: the prompt alone"):
        encode([example(row=0)], tokenizer, max_tokens=whole.start)


def test_a_response_without_tokens_is_named() -> None:
    import tokenizers

    tokenizer = make_tokenizer(SYSTEM_TEMPLATE)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u00ad", "")
    with pytest.raises(DataError, match=r"line 5: the response .* yields no token"):
        encode([example(response="\u00ad", row=4)], tokenizer)
    with pytest.raises(DataError, match="yields no token"):
        encode([example("", "x")], make_tokenizer(bos=False))


def test_order_labels_and_rows_are_kept_and_batching_changes_nothing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(SYSTEM_TEMPLATE)
    examples = read_contrast(write(tmp_path, PAIRS, "jsonl"))
    together = encode(examples, tokenizer)
    assert together == [encode([e], tokenizer)[0] for e in examples]
    assert [(e.label, e.row) for e in together] == [(e.label, e.row) for e in examples]
    assert together[0].start == together[1].start
    assert together[0].ids[: together[0].start] == together[1].ids[: together[1].start]
    assert encode([], tokenizer) == []


# What is built in


@pytest.mark.parametrize("name", behaviors())
def test_a_built_in_behaviour_has_enough_pairs(name: str) -> None:
    examples = load_behavior(name)
    assert all(isinstance(e.prompt, tuple) and [m.role for m in e.prompt] == ["user"] for e in examples)
    prompts = [e.prompt[0].content.lower() for e in examples if e.label == "positive" and e.prompt]  # type: ignore[union-attr]
    assert len(prompts) >= 64
    assert len(set(prompts)) == len(prompts)
    assert len({e.response for e in examples}) == len(examples)
    assert [e.label for e in examples] == ["positive", "negative"] * len(prompts)


def mean_words(name: str) -> tuple[float, float]:
    examples = load_behavior(name)
    positive, negative = (
        fmean(len(e.response.split()) for e in examples if e.label == label) for label in ("positive", "negative")
    )
    return positive, negative


def test_lengths_are_what_the_behaviours_say() -> None:
    assert set(behaviors()) == {"cautious", "concise", "formal", "truthful"}
    positive, negative = mean_words("concise")
    assert positive <= negative / 3
    for name in ("truthful", "formal", "cautious"):
        positive, negative = mean_words(name)
        assert abs(positive - negative) <= 0.2 * min(positive, negative)


def test_no_text_is_in_two_behaviours() -> None:
    texts = [e.response for name in behaviors() for e in load_behavior(name)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("name", "hint"), [("concice", "Did you mean concise?"), ("zzz", "formal, truthful.")])
def test_an_unknown_behaviour_names_those_there_are(name: str, hint: str) -> None:
    with pytest.raises(DataError, match="cautious, concise") as caught:
        load_behavior(name)
    assert str(caught.value).endswith(hint)


def test_neutral_text_is_paragraphs() -> None:
    text = neutral_text()
    assert 2400 <= len(text.split()) <= 2800
    assert len(text.split("\n\n")) > 20


def test_importing_needs_neither_torch_nor_transformers_nor_the_hub() -> None:
    code = (
        "import sys, steer2edit.contrast;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
