"""From a sentence to instructions and questions. A model writes the opposite of a trait, and what shows both.

What is written is checked before it is used. Where a model writes nothing usable, plain forms stand in, and a notice says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from steer2edit.data.prompts import Message
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Request, Sampling
from steer2edit.errors import DataError, count_of, shown
from steer2edit.notices import notice
from steer2edit.pairs.near_duplicates import repeated, similarity, words_of
from steer2edit.pairs.telling import Instructions
from steer2edit.pairs.writing import Writer

FORMS = (
    "Answer in this way: {}.",
    "Every answer of yours has this style: {}.",
    "Whatever you are asked, write your answer like this: {}.",
)
"""How an instruction is worded. Prompts take turns, so that no wording is the behaviour; both sides of a pair have the same."""
_UNFINISHED = frozenset(
    ("a", "an", "and", "as", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with")
)
_MAX_NAME, _MAX_DESCRIPTION = 60, 600
_TRIES = 6
_EXAMPLES = (
    (
        "answers in few words, without openings or closings",
        "answers at length, with a friendly opening and a long closing",
    ),
    ("uses difficult technical words", "uses simple everyday words that a child knows"),
    ("full of doubt, says what is not known", "sure of everything, admits no doubt"),
)


@dataclass(frozen=True)
class Trait:
    """What answers are to show: a short name, and a description that follows "Answer in this way:"."""

    name: str
    description: str

    @classmethod
    def read(cls, text: str) -> Trait:
        """A trait from ``NAME: description``. Raises DataError for any other text."""
        name, colon, description = (part.strip() for part in text.partition(":"))
        description = " ".join(description.split()).rstrip(".!")
        count = len(words_of(description))
        if not colon or not words_of(name) or count < 2:
            without = "without a colon" if not colon else "without a name" if not words_of(name) else ""
            reason = without or f"whose description has {count_of(count, 'word')}"
            raise DataError(
                f"the trait is {shown(text)}, {reason}; expected a name, a colon and a description of two words or more, such as "
                '"blunt: says what is wrong first, no flattery"'
            )
        if len(name) > _MAX_NAME or len(description) > _MAX_DESCRIPTION:
            raise DataError(
                f"the trait's name has {len(name)} characters and its description {len(description)}; expected at most "
                f"{_MAX_NAME} and {_MAX_DESCRIPTION}"
            )
        return cls(name, description)


def instructions(trait: Trait, opposite: str | None) -> Instructions:
    """Instructions of every form for the trait and for its opposite; without one, none: the model's own answers."""
    against = ("",) if opposite is None else tuple(form.format(opposite) for form in FORMS)
    return Instructions(tuple(form.format(trait.description) for form in FORMS), against)


def write_opposite(trait: Trait, writer: Writer, seed: int = 0) -> str | None:
    """The opposite of a trait in the words of a model: the first usable one of several tries, or None."""
    shown_examples = "\n\n".join(f"Style: {style}\nOpposite: {other}" for style, other in _EXAMPLES)
    prompt = (
        "Here are styles of writing, each with its opposite.\n\n"
        f"{shown_examples}\n\nStyle: {trait.description}\nOpposite: …\n\n"
        "Write the opposite of the last style in one line, in the same form, and nothing else."
    )
    requests = [Request((Message("user", prompt),), sample=number) for number in range(_TRIES)]
    tries = writer.write(requests, Sampling(60, 0.7, seed=seed), "write the opposite")
    found = (read_opposite(one.text, trait) for one in tries)
    opposite = next((one for one in found if one), None)
    if opposite is None:
        notice(
            f"the writer gave no usable opposite of {shown(trait.description)} in {_TRIES} tries: the negative side is "
            "the model's own answers. A stronger --writer, or --negative TEXT, sets the sides further apart"
        )
    return opposite


def read_opposite(text: str, trait: Trait) -> str | None:
    """The opposite in what a model wrote.

    None where it is too long or short, the trait again, or one of the examples."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None
    line = re.sub(r"^(?:the )?opposite(?: style| of the last style)?\s*(?:is|:)\s*", "", lines[0], flags=re.IGNORECASE)
    line = line.strip(" \"'*…").rstrip(".!").strip()
    known = [trait.description, *(part for example in _EXAMPLES for part in example)]
    words = words_of(line)
    # a line that speaks of styles and opposites describes the task, and one that ends so was not ended
    if words and words[-1] in _UNFINISHED:
        return None
    if not 2 <= len(words) <= 30 or ":" in line or line.endswith("?") or {"opposite", "style", "styles"} & set(words):
        return None
    if any(similarity(line, one) >= 0.5 for one in known) or set(words) <= set(words_of(trait.description)):
        return None
    return line


def write_questions(trait: Trait, writer: Writer, count: int, seed: int = 0) -> list[Question]:
    """At most ``count`` things to ask a model for, in which the trait shows; near-duplicates are left out."""
    prompt = (
        f"A writing style is called {trait.name}: {trait.description}.\n\n"
        "Write 20 different messages that people could send to an assistant, such that an answer in this style and an answer "
        "in the opposite style would differ clearly. Do not name the style, and do not ask for any style. Vary the topic, the "
        "situation and the length. One message in each line, numbered from 1 to 20, without answers."
    )
    rounds = -(-count // 12)
    requests = [Request((Message("user", prompt),), sample=number) for number in range(rounds)]
    texts = writer.write(requests, Sampling(1200, 0.9, seed=seed), "write questions")
    messages = [message for one in texts for message in read_numbered(one.text)]
    messages = [message for message in messages if trait.name.casefold() not in message.casefold()]
    again = repeated(messages, least_words=1)
    messages = [message for index, message in enumerate(messages) if index not in again][:count]
    return [
        Question((Message("user", text),), f"question {i} of the writer") for i, text in enumerate(messages, start=1)
    ]


def read_numbered(text: str) -> list[str]:
    """The entries of a numbered list, of 3 to 80 words each, without quotation marks around them."""
    entries = re.findall(r"^\s*\d+\s*[.):]\s*(.+?)\s*$", text, re.MULTILINE)
    cleaned = [entry.strip("*").strip().strip('"“”').strip() for entry in entries]
    return [entry for entry in cleaned if 3 <= len(words_of(entry)) <= 80]
