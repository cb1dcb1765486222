"""Spans cover the response and the token that ends it; a pair's spans match; prompts are the template's own."""

from __future__ import annotations

from typing import Any

import pytest

from steer2edit.data.contrast import Example, Message
from steer2edit.data.templates import render_prompt
from steer2edit.data.tokens import Encoded, encode
from steer2edit.errors import DataError

BOS, EOS, END = "<s>", "</s>", "<|im_end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
DROPS_SYSTEM = TEMPLATE.replace("in messages", "in messages if m.role != 'system'")
CHAT = (Message("user", "Is it?"), Message("assistant", "No."), Message("user", "Really?"))
LONG = "Well, let me see: it is."


def make_tokenizer(template: str | None = None, *, bos: bool = True, closes: bool = False, eos: bool = True) -> Any:
    """Bytes as tokens, with one merge, of a space and "y"; ``closes`` puts the EOS behind every text."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, *alphabet, "Ġy"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("Ġ", "y")]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} " * bos + "$A" + f" {EOS}" * closes, special_tokens=[(BOS, 0), (EOS, 1)]
    )
    # white space may be an added token too, as in some published tokenizers
    core.add_tokens([tokenizers.AddedToken("\n\n\n", normalized=False)])
    core.add_special_tokens([tokenizers.AddedToken(END, special=True)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS if eos else None
    )
    tokenizer.chat_template = template
    return tokenizer


def example(prompt: Any = "Is it?", response: str = "Yes.", label: Any = "positive", row: int = 0) -> Example:
    return Example(prompt, response, label, f"x.jsonl line {row + 1}", row)


def pair(row: int = 0, prompt: Any = "Is it?", positive: str = "Yes.", negative: str = LONG) -> list[Example]:
    return [example(prompt, positive, "positive", row), example(prompt, negative, "negative", row)]


def length(encoded: Encoded) -> int:
    return len(encoded.ids) - encoded.start


def spanned(tokenizer: Any, encoded: Encoded) -> str:
    return str(tokenizer.decode(encoded.ids[encoded.start :]))


# The span


@pytest.mark.parametrize(
    ("prompt", "response", "template", "closes", "system"),
    [
        ("Is it?", "Yes.", None, False, None),
        ("Is it?", "yes", None, True, "Be brief."),
        ("Ist es schön? ", "yes", None, False, None),
        ("", " yes", None, True, None),
        ("a\n\n", "ünïcode 🙂", None, True, "Be brief."),
        (CHAT, "Yes.", None, False, "Be brief."),
        ("Is it?", "Yes.", TEMPLATE, False, None),
        ("Ist es schön? ", "ünïcode 🙂", TEMPLATE, True, None),
        ("", "yes", TEMPLATE, False, "Be brief."),
        ("a\n\n", " yes", TEMPLATE, True, "Be brief."),
        (CHAT, "yes", TEMPLATE, True, None),
    ],
)
def test_the_span_is_the_response_and_its_end(
    prompt: Any, response: str, template: str | None, closes: bool, system: str | None
) -> None:
    tokenizer = make_tokenizer(template, closes=closes)
    (found,) = encode([example(prompt, response)], tokenizer, system=system)
    before = render_prompt(prompt, tokenizer, system)
    end = END if template else EOS
    assert spanned(tokenizer, found).strip() == response.strip() + end
    assert tokenizer.decode(found.ids).removeprefix(BOS).startswith(before.removeprefix(BOS))
    assert found.ids.count(0) == 1, "one BOS"
    assert found.ids[0] == 0
    assert (EOS in tokenizer.decode(found.ids)) == (template is None), "no EOS where the template has its own end"
    assert system is None or system in before


def test_a_token_merged_across_the_boundary_is_the_responses() -> None:
    tokenizer = make_tokenizer(eos=False)
    (merged,), (apart,) = (encode([example("Is it? ", response)], tokenizer) for response in ("yes", "no"))
    assert spanned(tokenizer, merged) == " yes"
    assert spanned(tokenizer, apart) == "no"
    assert merged.start == apart.start - 1


@pytest.mark.parametrize(
    ("prompt", "response", "whole"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "b", "a\nb"), ("", "bc", "bc")],
)
def test_plain_text_is_joined_by_one_space_at_most(prompt: str, response: str, whole: str) -> None:
    tokenizer = make_tokenizer(bos=False)
    (found,) = encode([example(prompt, response)], tokenizer)
    assert tokenizer.decode(found.ids) == whole + EOS


def test_order_labels_and_rows_are_kept_and_batching_changes_nothing() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    examples = [*pair(0), *pair(1, CHAT, "hi, hi", "Grüße\u2028 – hi!")]
    together = encode(examples, tokenizer)
    assert together == [*encode(examples[:2], tokenizer), *encode(examples[2:], tokenizer)]
    assert [(e.label, e.row) for e in together] == [(e.label, e.row) for e in examples]
    assert together[0].start == together[1].start
    assert together[0].ids[: together[0].start] == together[1].ids[: together[1].start]
    assert encode([], tokenizer) == []


# The end


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, EOS),
        (TEMPLATE, END),
        (TEMPLATE.replace(END, "\n\n\n <|im_end|>"), END),
        (TEMPLATE.replace(END, "[/turn]<|im_end|></s>"), END),
        (TEMPLATE.replace(END, " {{ eos_token }}"), EOS),
        (TEMPLATE.replace(END, ""), EOS),
        (TEMPLATE.replace("m.content", "m.content | trim | upper"), EOS),
        (TEMPLATE.replace("{{ bos_token }}", "{{ raise_exception('no') if messages | length > 1 }}"), EOS),
        (TEMPLATE.replace("in messages", "in messages if m.role == 'user'"), EOS),
    ],
    ids=["plain", "own", "after space", "after text", "eos", "none", "rewrites", "rejects", "drops"],
)
def test_the_end_is_the_templates_own_else_the_eos(template: str | None, end: str) -> None:
    tokenizer = make_tokenizer(template)
    (found,) = encode([example()], tokenizer)
    assert spanned(tokenizer, found).strip() == f"Yes.{end}"
    without = make_tokenizer(template, eos=False)
    if "eos_token" not in (template or ""):
        (found,) = encode([example()], without)
        assert spanned(without, found).strip() == ("Yes." if end == EOS else f"Yes.{END}")


@pytest.mark.parametrize("closes", [False, True])
def test_a_response_that_brings_its_own_end_gets_no_second(closes: bool) -> None:
    tokenizer = make_tokenizer(closes=closes)
    (found,) = encode([example(response=f"Yes.{EOS}")], tokenizer)
    assert spanned(tokenizer, found).strip() == f"Yes.{EOS}"
    (inside,) = encode([example(response=f"Yes.{EOS} No.")], tokenizer)
    assert inside.ids.count(1) == 2


# Pairs


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "templated"])
@pytest.mark.parametrize(
    ("prompt", "positive", "negative"),
    [("Is it?", "Yes.", LONG), ("Is it?", LONG, "No"), (CHAT, "ünï", "🙂🙂🙂"), ("Is it? ", "yes", "no, it is not")],
)
def test_a_pairs_spans_match(template: str | None, prompt: Any, positive: str, negative: str) -> None:
    tokenizer = make_tokenizer(template)
    examples = pair(0, prompt, positive, negative)
    found = encode(examples, tokenizer)
    whole = encode(examples, tokenizer, span="response")
    assert len({length(e) for e in found}) == 1
    assert length(found[0]) == min(length(e) for e in whole)
    for one, full, given in zip(found, whole, examples, strict=True):
        assert one.start == full.start
        assert one.ids == full.ids[: len(one.ids)]
        text = tokenizer.decode(one.ids[one.start :], skip_special_tokens=True)
        assert given.response.startswith(text.lstrip().rstrip("\ufffd")), "a cut may fall inside a character"


def test_response_keeps_everything() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    found = encode(pair(), tokenizer, span="response")
    assert [spanned(tokenizer, e) for e in found] == [f"Yes.{END}", f"{LONG}{END}"]


def test_rows_without_a_counterpart_stay_whole() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    alone = [
        example(response="Yes.", row=0),
        example(response=LONG, row=1, label="negative"),
        *(example(response=text, row=2) for text in ("One.", LONG)),
        # two sources put together: the same number, another prompt
        example("What?", LONG, "negative", 0),
    ]
    assert encode(alone, tokenizer) == encode(alone, tokenizer, span="response")


def test_all_responses_of_a_row_match_however_many() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    examples = [example(response="Yes, sir."), *pair(), example(response="No.", label="negative", row=1)]
    assert [length(e) for e in encode(examples, tokenizer)] == [5, 5, 5, 4]


def test_matching_follows_the_cut() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    start = encode(pair(), tokenizer)[0].start
    assert [length(e) for e in encode(pair(), tokenizer, max_tokens=start + 3)] == [3, 3]


def test_an_unknown_span_is_refused() -> None:
    with pytest.raises(DataError, match='no span "first"; there are matched, response'):
        encode([], make_tokenizer(), span="first")  # type: ignore[arg-type]


# Prompts


def test_chats_without_a_template() -> None:
    tokenizer = make_tokenizer()
    assert render_prompt("p", tokenizer) == "p"
    assert render_prompt("p", tokenizer, "s") == "s\n\np"
    turns = "User: Is it?\nAssistant: No.\nUser: Really?\nAssistant:"
    assert render_prompt(CHAT, tokenizer) == turns
    assert render_prompt(CHAT, tokenizer, "s") == f"s\n\n{turns}"
    assert render_prompt((Message("system", "s"), *CHAT), tokenizer) == f"s\n\n{turns}"


def test_a_string_prompt_is_one_user_message() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    assert render_prompt("p", tokenizer) == render_prompt((Message("user", "p"),), tokenizer)
    assert render_prompt("p", tokenizer, "s") == f"<s>[system] s{END}\n[user] p{END}\n[assistant] "


@pytest.mark.parametrize(
    ("template", "prompt", "system", "message"),
    [
        (NO_SYSTEM, "p", "s", r"line 3: the chat template rejects .*System role not supported.*leave the system"),
        (NO_SYSTEM, (Message("system", "s"), *CHAT), None, "rejects messages with roles system, user"),
        (DROPS_SYSTEM, "p", "Be brief.", "line 3: the chat template drops the system message; leave"),
        (TEMPLATE, (Message("system", "t"), *CHAT), "s", "line 3: .*keep one"),
        (None, (Message("system", "t"), *CHAT), "s", "line 3: .*keep one"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, None, "roles must alternate.*check the order"),
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

    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u00ad", "")
    with pytest.raises(DataError, match=r"line 5: the response .* yields no token"):
        encode([example(response="\u00ad", row=4)], tokenizer)
    with pytest.raises(DataError, match="yields no token"):
        encode([example("", "x")], make_tokenizer(bos=False))
