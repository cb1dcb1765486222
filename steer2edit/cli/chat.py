"""``chat``: the base and an edited model beside each other."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.data_options import TemplateFlags
from steer2edit.cli.options import ModelFlags
from steer2edit.options import option


@dataclass(frozen=True)
class ChatFlags(TemplateFlags):
    """What stands around the chat, and how long answers get."""

    heading: ClassVar[str] = "Chat"

    max_new_tokens: int = option(200, "Length of an answer in tokens, at most.", minimum=1)


@command(shown=ChatFlags, model_flags=ModelFlags)
@click.argument("model", metavar="BASE")
@click.argument("edited", metavar="EDITED")
def chat(model: str, edited: str, shown: ChatFlags, model_flags: ModelFlags) -> None:
    """Ask BASE and EDITED (a plan, adapter or checkpoint) the same, and show both answers side by side.

    Reads questions from the terminal, or one a line from a pipe. /reset begins anew, /quit ends.
    """
    from rich.console import Console

    from steer2edit.evaluation.candidates import open_candidate
    from steer2edit.evaluation.chat import Chat, side_by_side

    arguments = shown.template_arguments
    checkpoint, spec = model_flags.open(model)
    loaded = model_flags.load(checkpoint, spec)
    candidate = open_candidate(loaded, checkpoint, edited, model_flags.runtime())
    conversation = Chat(loaded, candidate, shown.max_new_tokens, shown.system, arguments)
    console = Console(highlight=False)
    asking = sys.stdin.isatty()
    while True:
        try:
            question = input("> ") if asking else next(sys.stdin, "/quit\n").rstrip("\n")
        except (EOFError, KeyboardInterrupt):
            return
        if question.strip() == "/quit":
            return
        if question.strip() == "/reset":
            conversation.reset()
        elif question.strip():
            if not asking:
                console.print(f"> {question}", markup=False)
            console.print(side_by_side(conversation.ask(question), (checkpoint.name, candidate.name)))
