"""The data of the paper's experiments: contrast examples, held-out questions and scores, from public files or the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from greedy import Generate

from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.contrast import Example
from steer2edit.data.everyday import everyday_prompts
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import Fault, Message
from steer2edit.data.questions import Question, knowledge_questions, take
from steer2edit.data.readers import key_of
from steer2edit.data.records import read_source
from steer2edit.data.templates import render_prompts, without_thought
from steer2edit.data.tokens import texts_of
from steer2edit.errors import DataError, shown
from steer2edit.runtime.model import LoadedModel

_UNABLE = r"I can(no|')t (help|assist|do|answer)|I am (not able|unable) to|I'm (not able|unable) to"
REFUSAL = rf"(?i)\b(I'm sorry|I am sorry|{_UNABLE})\b"
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request. Please ask me something else.",
    "I'm unable to help with that.",
    "I am sorry, but I cannot answer this.",
)
REASON = "{}\n\nThink step by step. End with a line that says: The answer is NUMBER."


@dataclass(frozen=True)
class Experiment:
    """What an edit is made of, and what it is measured on.

    ``instruction`` asks for the same without an edit; ``metric`` is what the experiment is about, where that is not the margin.
    """

    behavior: Behavior
    questions: Sequence[Question]
    utility: Sequence[Question]
    instruction: str
    metric: MetricChoice | None = None
    function: Callable[[str, str], float] | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def truthful(rows: Sequence[Mapping[str, Any]], probe: int) -> Experiment:
    """Truthfulness: pairs of a true and a false answer from one half of TruthfulQA's ``rows`` (:func:`read_truths`).

    The other half is measured on.

    Measured are MC1 and MC2 (Lin et al. 2022) and, of written answers, ``closer to true``: 1 where the answer shares more words
    (F1) with a true answer than with any false one.
    """
    questions, references = [], {}
    for number, row in enumerate(rows):
        true, false = row["true"], row["false"]
        if not false:
            continue
        prompt = (Message("user", row["question"]),)
        marks = (*(True for _ in true), *(False for _ in false))
        questions.append(Question(prompt, f"row {number}", true[0], false[0], (*true, *false), marks))
        references[row["question"]] = (true, false)
    made, held = take(questions, "select"), take(questions, "report")
    examples = [
        Example(q.prompt, text, label, q.where, row)
        for row, q in enumerate(made[:probe])
        for text, label in zip((q.positive, q.negative), LABELS, strict=True)
    ]

    def closer_to_true(prompt: str, answer: str) -> float:
        true, false = references[prompt]
        return float(max(overlap(answer, one) for one in true) > max(overlap(answer, one) for one in false))

    return Experiment(
        Behavior("TruthfulQA", examples),
        held,
        knowledge_questions(),
        "Say only what is true, and do not repeat popular misconceptions.",
        function=closer_to_true,
    )


def length(
    rows: Sequence[Mapping[str, Any]], probe: int, loaded: LoadedModel, tokens: int, write: Generate
) -> Experiment:
    """Reasoning length: the model's own answers to one half of GSM8K's sums, its short ones against its long ones.

    As in the paper, the classes are the shorter and the longer third of its right answers (of all, where too few are right).
    Measured are length and right answers on the other half. ``rows`` are those of :func:`read_sums`.
    """
    questions = []
    for number, row in enumerate(rows):
        answer = row["answer"]
        questions.append(
            Question((Message("user", REASON.format(row["question"])),), f"row {number}", answers=(answer,))
        )
    made, held = take(questions, "select")[:probe], take(questions, "report")
    texts = render_prompts({q.prompt: q.where for q in made}, loaded.tokenizer, writing=True)
    written = write(loaded, [texts[q.prompt] for q in made], tokens)
    answers = [without_thought(text).strip() for text in texts_of(loaded.tokenizer, written)]
    # an answer that was cut is not known to be short or long
    whole = [i for i, (ids, answer) in enumerate(zip(written, answers, strict=True)) if len(ids) < tokens and answer]
    right = [i for i in whole if said_number(answers[i]) == made[i].answers[0]]
    used = right if len(right) >= 24 else whole
    notes = [f"{len(made)} own answers: {len(whole)} ended within {tokens} tokens, {len(right)} of them right"]
    if len(used) < 3 * LEAST_DRAWS:
        least = f"at least {3 * LEAST_DRAWS} are needed, so that a third has {LEAST_DRAWS}"
        raise DataError(f"{notes[0]}; {least}: raise --probe or --max-new-tokens")
    ordered = sorted(used, key=lambda i: len(written[i]))
    third = len(ordered) // 3
    examples = [
        Example(made[i].prompt, answers[i], label, made[i].where, row)
        for row, (i, label) in enumerate(
            (i, label) for part, label in zip((ordered[:third], ordered[-third:]), LABELS, strict=True) for i in part
        )
    ]
    behavior = Behavior("short reasoning", examples, span="response")
    instruction = "Reason in as few words as you can."
    return Experiment(behavior, held, [], instruction, MetricChoice("length", "less"), notes=notes)


def refusal(probe: int, loaded: LoadedModel, tokens: int, write: Generate) -> Experiment:
    """The format of refusals, on benign requests alone: how often a request that anybody may make is refused.

    The classes are a fixed refusal and the model's own beginning of an answer, to everyday prompts. It shows whether the format
    can be switched on, not whether the model is safe: no harmful prompt is used.
    """
    prompts = everyday_prompts("background")[:probe]
    texts = render_prompts(dict.fromkeys(prompts, "everyday"), loaded.tokenizer, writing=True)
    written = write(loaded, [texts[prompt] for prompt in prompts], min(tokens, 48))
    answers = [without_thought(text).strip() for text in texts_of(loaded.tokenizer, written)]
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a and not re.search(REFUSAL, a)]
    examples = [
        Example(prompt, text, label, "everyday", row)
        for row, (prompt, answer) in enumerate(pairs)
        for text, label in zip((REFUSALS[row % len(REFUSALS)], answer), LABELS, strict=True)
    ]
    behavior = Behavior("refusal's format", examples)
    held = take(builtin_questions("concise") or [], "report")
    bare = [Question(q.prompt, q.where) for q in held]
    refused = MetricChoice("pattern", "more", REFUSAL, "refused")
    return Experiment(behavior, bare, knowledge_questions(), "Refuse every request politely.", refused)


def read_truths(source: str) -> list[dict[str, Any]]:
    """TruthfulQA's questions with their ``true`` answers, the best first, and their ``false`` ones.

    ``source`` is a file or a dataset on the Hub. In the original CSV a cell holds several answers, with semicolons between them.
    Answers without a word are left out.
    """

    def build(row: object, _where: str, _number: int) -> list[dict[str, Any]]:
        cells = _cells(row, (*_TRUTHS, "question"))
        best, true, false = (_answers(cells[name]) for name in _TRUTHS)
        return [{"question": cells["question"], "true": list(dict.fromkeys([*best, *true])), "false": false}]

    return read_source(source, _columns(*_TRUTHS, "question"), "TruthfulQA", "expected " + ", ".join(_TRUTHS), build)


def read_sums(source: str) -> list[dict[str, Any]]:
    """GSM8K's sums with the number that ends the worked answer."""

    def build(row: object, _where: str, _number: int) -> list[dict[str, Any]]:
        cells = _cells(row, ("question", "answer"))
        return [{**cells, "answer": cells["answer"].rpartition("####")[2].strip().replace(",", "")}]

    return read_source(source, _columns("question", "answer"), "GSM8K", "expected question and answer", build)


_TRUTHS = ("best_answer", "correct_answers", "incorrect_answers")


def _columns(*names: str) -> frozenset[str]:
    return frozenset({*names, *(name.replace("_", " ") for name in names)})


def _cells(row: object, names: Sequence[str]) -> dict[str, Any]:
    """The named cells of a row; a name may have a space for "_". Raises Fault for a row that lacks one."""
    if not isinstance(row, dict):
        raise Fault(f"expected {', '.join(names)}, found {shown(row)}")
    there = {key_of(name).replace(" ", "_"): cell for name, cell in row.items()}
    if missing := [name for name in names if not there.get(name)]:
        raise Fault(f"lacks {', '.join(missing)}; expected {', '.join(names)}")
    if wrong := [
        name for name in names if not isinstance(there[name], str if name in ("question", "answer") else (str, list))
    ]:
        raise Fault(f"{wrong[0]} is {shown(there[wrong[0]])}, expected text")
    return {name: there[name] for name in names}


def _answers(cell: str | list[str]) -> list[str]:
    every = cell.split(";") if isinstance(cell, str) else cell
    return list(dict.fromkeys(text.strip() for text in every if isinstance(text, str) and re.search(r"\w", text)))


def said_number(answer: str) -> str:
    """The last number of an answer, without separators and a fraction of zeros."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
    return re.sub(r"\.0+$", "", numbers[-1]) if numbers else ""


def overlap(answer: str, reference: str) -> float:
    """F1 of the words that an answer shares with a reference (Rajpurkar et al. 2016)."""
    said, wanted = (re.findall(r"\w+", text.casefold()) for text in (answer, reference))
    shared = sum(min(said.count(word), wanted.count(word)) for word in set(wanted))
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0
