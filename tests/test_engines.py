"""An engine's answers depend on the request and the seed alone, and its yes is the model's own probability."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, save_chat_model

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.prompts import Message
from steer2edit.data.templates import thought_and_answer
from steer2edit.engines import generation, transformers_engine
from steer2edit.engines.engine import Answer, Request, Sampling, written, yes_share
from steer2edit.engines.rendering import Rendering
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.errors import DataError, EngineError
from steer2edit.notices import collected
from steer2edit.runtime.model import LoadedModel, load_model

QUESTIONS = ["What is a river?", "Name three birds, and say why you like them.", "Why?", "Count to five.", "Who am I?"]
REQUESTS = [Request(question, sample=sample) for question in QUESTIONS for sample in range(2)]
DRAWN = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    checkpoint = open_checkpoint(save_chat_model(tmp_path_factory.mktemp("models") / "talker"))
    return load_model(checkpoint, read_spec(checkpoint))


@pytest.fixture
def engine(talker: LoadedModel) -> TransformersEngine:
    return TransformersEngine(talker)


def test_greedy_answers_are_those_of_generate(talker: LoadedModel, engine: TransformersEngine) -> None:
    answers = written(engine, [Request(question) for question in QUESTIONS], Sampling(max_new_tokens=10))
    texts = [f"<bos>user: {question}\nassistant: " for question in QUESTIONS]
    rows = generation.generate(talker, texts, max_new_tokens=10, add_special_tokens=False)
    assert [(answer.tokens, answer.ended) for answer in answers] == [(len(row), len(row) < 10) for row in rows]
    assert [answer.text for answer in answers] == [talker.tokenizer.decode(row).strip() for row in rows]


def test_a_drawn_answer_does_not_depend_on_its_batch(talker: LoadedModel, engine: TransformersEngine) -> None:
    together = written(engine, REQUESTS, DRAWN)
    assert [written(engine, [request], DRAWN)[0] for request in REQUESTS] == together
    other = TransformersEngine(talker, batch_size=3)
    assert written(other, REQUESTS[::-1], DRAWN) == together[::-1]
    # samples differ from each other, and so do seeds
    assert all(first != second for first, second in zip(together[::2], together[1::2], strict=True))
    assert all(a != b for a, b in zip(written(engine, REQUESTS, replace(DRAWN, seed=4)), together, strict=True))


def test_every_part_of_a_request_is_in_its_seed() -> None:
    first = Request("a", "b", "c", 1)
    others = [
        replace(first, prompt="x"),
        replace(first, system=None),
        replace(first, prefix=""),
        replace(first, sample=2),
    ]
    assert len({one.seed(0) for one in [first, *others]} | {first.seed(1)}) == 6
    assert Request("a").seed(0) == Request((Message("user", "a"),)).seed(0)
    assert 0 <= first.seed(0) < 2**31


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    requests = [Request("q", sample=n) for n in range(4000)]
    for top_p, nucleus in ((1.0, 4), (0.85, 2)):
        choose = transformers_engine._choosing(requests, Sampling(temperature=0.7, top_p=top_p), limit=2)
        drawn = choose(range(4000), 1, logits.expand(4000, 5))
        expected = (logits / 0.7).softmax(0)[:nucleus]
        shares = torch.bincount(drawn, minlength=5) / 4000
        assert int(drawn.max()) < nucleus
        torch.testing.assert_close(shares[:nucleus], expected / expected.sum(), atol=0.025, rtol=0.0)


def test_a_prefix_is_continued(loaded: LoadedModel) -> None:
    model = copy.deepcopy(loaded.model)
    # the random model writes words alone
    model.generation_config.suppress_tokens = [*range(4), *range(4 + len(WORDS), 128)]
    engine = TransformersEngine(replace(loaded, model=model))
    prompts = [f"what is the {word} ?" for word in ("cat", "dog", "tree")]
    wholes = written(engine, [Request(prompt) for prompt in prompts], Sampling(max_new_tokens=5))
    prefixes = [" ".join(whole.text.split()[:2]) for whole in wholes]
    begun = [Request(prompt, prefix=prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)]
    rest = written(engine, begun, Sampling(max_new_tokens=3))
    assert [prefix + one.text for prefix, one in zip(prefixes, rest, strict=True)] == [one.text for one in wholes]
    assert [one.tokens for one in rest] == [3, 3, 3] and rest[0].text.startswith(" ")


def test_yes_is_the_models_own_probability(talker: LoadedModel, engine: TransformersEngine) -> None:
    requests = [Request(question, system="Say yes or no.") for question in QUESTIONS]
    found = engine.yes(requests)
    for question, share in zip(QUESTIONS, found, strict=True):
        text = f"<bos>system: Say yes or no.\nuser: {question}\nassistant: "
        ids = torch.tensor([talker.tokenizer(text, add_special_tokens=False)["input_ids"]])
        probabilities = talker.model(input_ids=ids).logits[0, -1].double().softmax(0)
        # the model reads bytes: a yes begins with its first letter
        yes, no = (sum(float(probabilities[talker.tokenizer.vocab[one]]) for one in pair) for pair in ("yY", "nN"))
        assert share == pytest.approx(yes_share(yes, no), rel=1e-4)
    assert min(found) > 0 and max(found) < 1 and len(set(found)) == len(found)


def test_yes_where_neither_is_likely() -> None:
    assert yes_share(0.3, 0.1) == pytest.approx(0.75)
    assert torch.isnan(torch.tensor(yes_share(1e-5, 1e-4)))


def test_a_tokenizer_without_a_yes(loaded: Any) -> None:
    with pytest.raises(EngineError, match="has no token for 'no'"):
        tokenizer = copy.deepcopy(loaded.tokenizer)
        vocabulary = [word for word in tokenizer.get_vocab() if word != "no"]
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        reader = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
        TransformersEngine(replace(loaded, tokenizer=reader)).yes([Request("is it red ?")])


def test_a_prompt_without_room_is_refused_and_one_with_little_is_told(talker: LoadedModel) -> None:
    engine = TransformersEngine(talker)
    with pytest.raises(DataError, match="the model's context is 2048"):
        written(engine, [Request("x" * 3000)], Sampling(max_new_tokens=4))
    with collected() as notices:
        long, short = written(engine, [Request("x" * 2026), Request("y")], Sampling(max_new_tokens=8))
    assert long.tokens <= 4 and short.tokens <= 8
    assert notices == ["there is room for fewer than 8 tokens in 1 of 2 answers: the model's context is 2048"]


def test_a_batch_that_does_not_fit_is_made_smaller(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written(engine, REQUESTS, DRAWN)
    answers, sizes = generation._answers, []

    def little_memory(loaded: LoadedModel, batch: Any, *more: Any) -> Iterator[tuple[int, list[int]]]:
        sizes.append(len(batch))
        for number, one in enumerate(answers(loaded, batch, *more)):
            if len(batch) > 4 and number:
                raise torch.OutOfMemoryError
            yield one

    monkeypatch.setattr(generation, "_answers", little_memory)
    with collected() as notices:
        assert written(engine, REQUESTS, DRAWN) == expected
    assert sizes == [10, 5, 3, 3, 2] and "3 at a time from here" in notices[1]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nwell\n</think>\n\nIt is.", False, ("well", "\n\nIt is.")),
        ("well\n</think>It is.", True, ("well", "It is.")),
        ("<think>well, and then", False, ("well, and then", "")),
        ("well, and then", True, ("well, and then", "")),
        ("It is.", False, (None, "It is.")),
        ("[THINK]so[/THINK]It is.", False, ("so", "It is.")),
        ("a </think> b </think> c", True, ("a </think> b", " c")),
    ],
)
def test_the_thought_is_parted_from_the_answer(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert thought_and_answer(text, opened) == expected


@pytest.mark.parametrize("tags", ["text", "tokens"])
def test_tokens_of_a_thought_are_counted_apart(tags: str, talker: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(talker.tokenizer)
    if tags == "tokens":
        # Magistral's tags are special tokens, which decoding leaves out
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    row = tokenizer("<think>so it is</think>A river.", add_special_tokens=False)["input_ids"]
    unfinished = tokenizer("<think>so it", add_special_tokens=False)["input_ids"]
    engine = TransformersEngine(replace(talker, tokenizer=tokenizer), think=True)
    monkeypatch.setattr(transformers_engine, "answered_rows", lambda *_: iter([(1, unfinished), (0, row)]))
    answers = written(engine, [Request("a"), Request("b")], Sampling(max_new_tokens=40))
    ends = len(row) - len("A river.")
    assert answers[0] == Answer("A river.", len("A river."), True, "so it is", ends)
    assert answers[1] == Answer("", 0, True, "so it", len(unfinished))


def test_a_receipt_says_what_answered(engine: TransformersEngine, tmp_path: Path) -> None:
    described = engine.described()
    assert described["engine"] == "transformers" and described["model"] == "talker"
    assert described["dtype"] == "float32" and described["versions"]["torch"] == torch.__version__
    assert engine.count_tokens("river") == 5


def test_a_model_without_a_template_ends_an_answer_with_the_next_turn(talker: LoadedModel) -> None:
    tokenizer = copy.deepcopy(talker.tokenizer)
    tokenizer.chat_template = None
    rendering = Rendering(tokenizer, None, False)
    chat = Request((Message("user", "Why?"),))
    for text, kept, over in [
        (" Rain.\nUser: Why?", "Rain.", True),
        (" Rain.\n\nAssistant: Snow.", "Rain.", True),
        ("User: Why?", "", True),
        (" Rain. The User: me", "Rain. The User: me", False),
    ]:
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = rendering.answer(chat, "User: Why?\nAssistant:", [], row, False)
        assert (answer.text, answer.ended) == (kept, over)
        assert answer.tokens == len(answer.ids or ()) and tokenizer.decode(answer.ids).strip() == kept
        # a text to go on with has no turns, and a template ends answers itself
        assert rendering.answer(Request("Why?"), "Why?", [], row, False).text == text.strip()
        assert Rendering(talker.tokenizer, None, False).answer(chat, "", [], row, False).text == text.strip()
