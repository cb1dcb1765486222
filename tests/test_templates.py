"""Prompts are what the chat template writes, with the user's words once, and end where an answer stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import save_chat_model
from test_tokens import END, make_tokenizer

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.data.prompts import Message
from steer2edit.data.questions import Question
from steer2edit.data.templates import TemplateArguments, note_unread, render_prompt, render_prompts, without_thought
from steer2edit.data.tokens import encode
from steer2edit.engines.engine import Answer
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.errors import CheckpointError, DataError
from steer2edit.evaluation.suite import Suite
from steer2edit.notices import collected
from steer2edit.runtime.model import LoadedModel, load_model, load_tokenizer
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
USER_ONLY = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('Only user!') }}{% endif %}{% endfor %}"
)
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
HYBRID = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('content must be an iterable') }}{% endif %}"
    "[{{ m.role }}] {{ m.content[0].text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
LOOPED_PARTS = (
    "{% for m in messages %}[{{ m.role }}] {% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
OTHER_ROLES = (
    "{% for m in messages %}{% if m.role == 'human' %}H: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
THOUGHT = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def rendered(template: str, prompt: Any = "Is it?", **arguments: Any) -> tuple[str, list[str]]:
    with collected() as notes:
        return render_prompt(prompt, make_tokenizer(template), chat_template_kwargs=arguments), notes


# What is written


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"),
        (ALTERNATING, "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>model\n"),
        (USER_ONLY, "[INST] Is it? [/INST]"),
        ("{{ strftime_now('%Y')[:2] }}\n" + CHATML, "20\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
            "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (PARTS, "[user] Is it?<|im_end|>\n[assistant] "),
        (LOOPED_PARTS, "[user] Is it?<|im_end|>\n[assistant] "),
        ("{{ messages[-1].content | tojson }}{% if add_generation_prompt %} ->{% endif %}", '"Is it?" ->'),
    ],
    ids=["chatml", "alternating", "user only", "date", "generation", "parts", "looped parts", "json"],
)
def test_ordinary_templates_need_no_remark(template: str, text: str) -> None:
    assert rendered(template) == (text, [])


def test_arguments_that_a_template_does_not_name_are_said() -> None:
    reads = CHATML + "{# style is read #}{{ style | default('') }}"
    assert rendered(reads, style="x")[1] == []
    text, notes = rendered(reads, stile="x", styl=1, style="")
    assert notes == ["the chat template does not read stile, styl: as arguments for it they change nothing"]
    assert text == rendered(reads, style="")[0]
    assert "enable_thinking" in " ".join(rendered(CHATML, enable_thinking=False)[1])
    # of several templates the chosen one counts, and a template that is given itself is read too
    with collected() as said:
        note_unread(make_tokenizer({"default": CHATML, "tool_use": reads}), {"chat_template": "tool_use", "style": 1})
        note_unread(make_tokenizer(CHATML), {"chat_template": reads, "style": 1})
        note_unread(make_tokenizer(), {"style": 1})
    assert said == []
    with collected() as said:
        note_unread(make_tokenizer({"default": CHATML, "tool_use": reads}), {"style": 1})
    assert len(said) == 1


def test_parts_are_used_in_chats_and_for_the_end_of_an_answer() -> None:
    chat = (Message("user", "One?"), Message("assistant", "Yes."), Message("user", "Two?"))
    tokenizer = make_tokenizer(PARTS)
    assert render_prompt(chat, tokenizer).count("[user]") == 2
    (found,) = encode([Example(chat, "No.", "positive", "here", 0)], tokenizer)
    assert tokenizer.decode(found.ids[found.start :]) == f"No.{END}"


def test_a_list_of_templates_has_a_default_or_a_name_is_chosen() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "T" + CHATML}
    assert render_prompt("a", tokenizer).startswith("<|im_start|>user")
    assert render_prompt("a", tokenizer, chat_template_kwargs={"chat_template": "tool_use"}).startswith("T<|im_start|>")
    with pytest.raises(DataError, match='no chat template called "tools"; the tokenizer has default, tool_use'):
        render_prompt("a", tokenizer, chat_template_kwargs={"chat_template": "tools"})
    with pytest.raises(DataError, match="the tokenizer has one, without a name"):
        render_prompt("a", make_tokenizer(CHATML), chat_template_kwargs={"chat_template": "tools"})
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(DataError, match=r"2 chat templates \(rag, tool_use\) and none is called default; choose one"):
        render_prompts({str(i): f"line {i}" for i in range(9)}, tokenizer)


# Where answers stand


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}], ids=["default", "off"])
@pytest.mark.parametrize("template", [OPENS_THOUGHT, HYBRID], ids=["opens", "hybrid"])
def test_answers_stand_after_a_thought(template: str, arguments: dict[str, Any]) -> None:
    text, notes = rendered(template, **arguments)
    assert text == THOUGHT
    silent = template == HYBRID and arguments
    assert len(notes) == (0 if silent else 1)
    assert silent or "after an empty thought (</think>)" in notes[0]
    (found,) = encode([Example("Is it?", "Yes.", "positive", "here", 0)], make_tokenizer(template))
    assert make_tokenizer().decode(found.ids) == f"{THOUGHT}Yes.{END}"


@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        (OPENS_THOUGHT, "<think>", "</think>"),
        (HYBRID, "<think>", "</think>"),
        (CHATML.replace("assistant\n{% endif", "assistant\n[THINK]\n{% endif"), "[THINK]", "[/THINK]"),
    ],
    ids=["opens", "hybrid", "other tag"],
)
@pytest.mark.parametrize("answer", ["\n\nYes.", ""], ids=["with the answer", "alone"])
def test_a_response_that_brings_its_thought_stands_where_thoughts_begin(
    template: str, opening: str, closing: str, answer: str
) -> None:
    tokenizer = make_tokenizer(template)
    examples = [
        Example("Is it?", f"<think>\nHm.\n</think>{answer}", "positive", "here", 0),
        Example("Is it?", "No.", "negative", "here", 0),
    ]
    thinking, plain = encode(examples, tokenizer, span="response")
    begin = THOUGHT[: THOUGHT.index("<think>")]
    assert tokenizer.decode(thinking.ids) == f"{begin}{opening}\nHm.\n{closing}{answer}{END}"
    assert tokenizer.decode(plain.ids) == f"{begin}{opening}\n\n{closing}\n\nNo.{END}"


@pytest.mark.parametrize("template", [OPENS_THOUGHT, HYBRID], ids=["opens", "hybrid"])
def test_a_model_that_writes_may_think_when_asked_to(template: str) -> None:
    tokenizer = make_tokenizer(template)
    thinks = {"enable_thinking": True}
    assert "</think>" not in render_prompt("Is it?", tokenizer, chat_template_kwargs=thinks, writing=True)
    assert render_prompt("Is it?", tokenizer, chat_template_kwargs=thinks) == THOUGHT, "responses stand after it"
    assert render_prompt("Is it?", tokenizer, writing=True) == THOUGHT


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("Yes.", "Yes."),
        ("<think>Hm.</think>\n\nYes.", "Yes."),
        ("Hm.</think> Yes.", "Yes."),
        ("[THINK]Hm.[/THINK]Yes.", "Yes."),
        ("<think>Hm", "<think>Hm"),
    ],
)
def test_a_finished_thought_is_no_part_of_an_answer(answer: str, rest: str) -> None:
    assert without_thought(answer) == rest


@pytest.mark.parametrize(
    ("opening", "closed"),
    [("<seed:think>", "<seed:think>\n\n</seed:think>\n\n"), ("[THINK]", "[THINK]\n\n[/THINK]\n\n")],
)
def test_other_tags_are_closed_too(opening: str, closed: str) -> None:
    text, notes = rendered(CHATML.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif"))
    assert text.endswith(closed) and len(notes) == 1


def test_the_assistants_header_is_taken_from_an_answer() -> None:
    text, notes = rendered(TURNS)
    assert text == rendered(CHATML)[0]
    assert len(notes) == 1 and "no generation prompt; the assistant's header" in notes[0]
    text, notes = rendered(CHANNELS)
    assert text == "<|start|>user<|message|>Is it?<|end|><|start|>assistant<|channel|>final<|message|>"
    assert len(notes) == 1 and "where the chat template puts an answer" in notes[0]
    text, notes = rendered("{{ messages[-1].content }}")
    assert text == "Is it?"
    assert len(notes) == 1 and "responses follow the prompt directly" in notes[0]


# What is refused


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (OTHER_ROLES, "the chat template drops the user message"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"),
            "writes the user message 2 times; expected once",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content | replace('it', '') }}"),
            "drops or changes words of the user message",
        ),
        ("{% for m in messages %}{{ m.content }", r"not valid Jinja \(unexpected '}'\)"),
        ("{{ messages[0].content[0].language | upper + 1 }}", "the chat template rejects"),
        ("{{ raise_exception('Item must have a source_lang_code in its content') }}", "source_lang_code"),
        ("{{ 'many words ' * 3000000 }}{{ messages[0].content }}", "it writes 33000010 characters, and at most"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_once(template: str, fault: str) -> None:
    prompts = {f"Is it {i}?": f"x.jsonl line {i}" for i in range(1, 9)}
    with pytest.raises(DataError, match=fault) as caught:
        render_prompts(prompts, make_tokenizer(template))
    assert len(str(caught.value).splitlines()) == 2, caught.value
    assert "x.jsonl line 1 and 7 more: " in str(caught.value)
    assert "names of the roles" not in str(caught.value)


def test_a_template_that_keeps_the_last_message_only_takes_single_turns() -> None:
    last = "{{ messages[-1].content }}{% if add_generation_prompt %} A:{% endif %}"
    assert rendered(last)[0] == "Is it? A:"
    with pytest.raises(DataError, match="drops the user message"):
        rendered(last, (Message("user", "One?"), Message("assistant", "Yes."), Message("user", "Two?")))


# Files


def test_the_template_of_a_processor_is_used_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    with collected() as notes:
        assert render_prompt("Is it?", load_tokenizer(tmp_path)) == rendered(CHATML)[0]
    assert notes == ["the chat template is that of chat_template.json; the tokenizer has none of its own"]
    make_tokenizer(PARTS).save_pretrained(tmp_path)
    assert render_prompt("Is it?", load_tokenizer(tmp_path)) == rendered(PARTS)[0]


@pytest.mark.parametrize("content", ["[]", '{"chat_template": 3}', "{"])
def test_a_processors_template_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(DataError, match=r"chat_template\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="there is no tokenizer in"):
        load_tokenizer(tmp_path)


# Arguments


class Seen(TransformersEngine):
    """Writes one word to everything, and keeps the prompts as the template writes them."""

    def __init__(self, loaded: LoadedModel, arguments: TemplateArguments | None, seen: list[list[str]]) -> None:
        super().__init__(loaded, chat_template_kwargs=arguments)
        self._seen = seen

    def write(self, requests: Any, sampling: Any, progress: Any = None) -> Iterator[tuple[int, Answer]]:
        self._seen.append(self._rendering.texts(requests, answering=True))
        return iter([(index, Answer("the", 1, True)) for index in range(len(requests))])


def test_arguments_are_recorded_and_reach_every_task(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_chat_model(tmp_path / "model"))
    loaded = load_model(checkpoint, read_spec(checkpoint))
    loaded.tokenizer.chat_template = "{{ note | default('') }}" + loaded.tokenizer.chat_template
    examples = [Example("a", text, label, "here", 0) for text, label in (("yes", "positive"), ("no", "negative"))]
    with_note, without = (
        capture_statistics(
            loaded, checkpoint, Behavior("b", examples, chat_template_kwargs=arguments), background="one two " * 9
        )
        for arguments in ({"note": "hear this: "}, None)
    )
    assert with_note.source["chat_template_kwargs"] == {"note": "hear this: "}
    assert "chat_template_kwargs" not in without.source
    with_note.save(tmp_path / "statistics")
    assert Statistics.load(tmp_path / "statistics").source == with_note.source
    questions = [Question("a", "here", "yes", "no", ("one", "two"), (True, False)), Question("b", "here")]
    neutral = NeutralTexts(NeutralText(loaded, "the river runs to the sea . " * 20))
    answers = []
    for arguments in ({"note": "hear this: "}, None):
        suite = Suite(
            questions,
            [],
            neutral,
            max_new_tokens=8,
            chat_template_kwargs=arguments,
            engine=lambda loaded, arguments: Seen(loaded, arguments, answers),
        )
        context = suite.context("report")
        assert context.get("chat_template_kwargs") == arguments
        split = next(split for split in ("report", "select") if any(q.positive for q in suite.questions(split)))
        for task in suite.tasks(split):
            task.measure(loaded)
    assert all(text.startswith("hear this: ") for text in answers[0])
    assert not any(text.startswith("hear this: ") for text in answers[-1])


def test_arguments_reach_the_template_and_nothing_else() -> None:
    template = "{{ note }}" + CHATML
    assert rendered(template, note="hear ")[0].startswith("hear <|im_start|>")
    with pytest.raises(DataError, match="cannot set tokenize"):
        rendered(template, tokenize=True)
    with pytest.raises(DataError, match="must be JSON values"):
        rendered(template, note=object())
    with pytest.raises(DataError, match="no chat template to take the arguments note"):
        render_prompt("a", make_tokenizer(), chat_template_kwargs={"note": "b"})
