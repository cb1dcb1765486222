"""Which prompts data is made from: each once, and a number of them that does not depend on their order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from steer2edit.data.prompts import Prompt, prompt_text
from steer2edit.data.questions import Question
from steer2edit.errors import DataError, count_of
from steer2edit.notices import notice
from steer2edit.pairs.near_duplicates import copies, repeated


def chosen_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The questions without repeated prompts, ``limit`` of them at most; which ones depends on what is in them.

    A prompt repeats another where the last messages are nearly the same, and the chats before them are the same.
    """
    distinct = list({question.digest: question for question in reversed(questions)}.values())[::-1]
    chats: dict[Prompt, list[int]] = {}
    for index, question in enumerate(distinct):
        chats.setdefault("" if isinstance(question.prompt, str) else question.prompt[:-1], []).append(index)
    again: set[int] = set()
    for members in chats.values():
        texts = [prompt_text(distinct[index].prompt) for index in members]
        again |= {members[i] for i in repeated(texts) | copies([[text] for text in texts], [""] * len(texts))}
    left = [question for index, question in enumerate(distinct) if index not in again]
    if dropped := len(questions) - len(left):
        notice(f"{dropped} of {count_of(len(questions), 'prompt')} left out: another one says the same, or nearly")
    if not left:
        raise DataError("there are no prompts to make data from")
    if limit is None or len(left) <= limit:
        return left
    ranked = sorted(left, key=lambda q: hashlib.sha256(q.digest.encode("ascii")).hexdigest())
    used = {question.digest for question in ranked[:limit]}
    return [question for question in left if question.digest in used]
