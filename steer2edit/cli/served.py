"""``eval --server``: what servers serve, measured by its answers, without a model in this process.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from steer2edit.cli.data_options import DataFlags, StatsFlags
from steer2edit.cli.engine_flags import names_server
from steer2edit.cli.evaluate_flags import BaselineFlags, HowFlags
from steer2edit.cli.judge_flags import JudgeFlags
from steer2edit.cli.options import ModelFlags, UnquantisedFlags, progress_bar
from steer2edit.cli.suite import SuiteFlags
from steer2edit.errors import count_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from steer2edit.engines.server_client import ServerClient
    from steer2edit.evaluation.evaluate import Evaluation
    from steer2edit.evaluation.served import ServedModel
    from steer2edit.pairs.journal import Journal

_TOKENIZER = ("*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
"""Of a model on the Hub these files alone are fetched, and no weights."""
_TAKEN = ("base", "instruction")
_JOURNAL = ".journal.jsonl"
"""The end of the name of the file with the answers so far, beside that of the evaluation."""


@dataclass(frozen=True)
class _Name:
    """What a ``--served`` names.

    It is a label for the tables, a server's URL (None for the base's server), and a name there.
    """

    label: str
    url: str | None
    model: str | None

    @classmethod
    def read(cls, text: str) -> _Name:
        """``[LABEL=]NAME``, or ``[LABEL=]URL[#NAME]``."""
        before, sign, after = text.partition("=")
        label, where = (before.strip(), after) if sign and "://" not in before else ("", text)
        url, _, name = where.partition("#") if names_server(where) else ("", "", where)
        if not (url or name) or (sign and "://" not in before and not label):
            raise click.BadParameter(
                f"{text!r} is not of the form [LABEL=]NAME, or [LABEL=]URL[#NAME] for another server",
                param_hint="--served",
            )
        return cls(label or name or url.partition("://")[2], url or None, name or None)


def check_served(
    candidates: Sequence[str],
    stats: StatsFlags,
    asked: SuiteFlags,
    judged: JudgeFlags,
    compared: BaselineFlags,
    how: HowFlags,
    model: ModelFlags,
    unquantised: UnquantisedFlags,
) -> None:
    """Raise UsageError where a flag needs weights in this process, or two served models have one label."""
    if candidates:
        raise click.UsageError(
            f"{candidates[0]} is a file, and with --server nothing is loaded here: name what the server serves with --served, or "
            "leave --server out"
        )
    if asked.repetition_penalty is not None:
        raise click.UsageError(
            "a repetition penalty is set where the server is started: leave --repetition-penalty out"
        )
    plain = ModelFlags()
    here = judged.judge not in (None, "self") and not names_server(judged.judge)
    unused: dict[str, Any] = {
        "--baselines": compared.baselines,
        "--strengths": compared.strengths,
        "--against": compared.against,
        "--stats": stats.stats,
        "--neutral": asked.neutral,
        "--lm-eval": how.tasks,
        "--weights": unquantised.unquantised,
        "--device": model.device != plain.device and not here,
        "--dtype": model.dtype != plain.dtype and not here,
        "--device-map": model.device_map is not None and not here,
    }
    if names := [name for name, value in unused.items() if value]:
        raise click.UsageError(
            f"{', '.join(names)}: this needs the model's weights in this process, and with --server answers are all there is; "
            "leave it or --server out"
        )
    labels = [*_TAKEN, *(_Name.read(text).label for text in how.served)]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise click.UsageError(f"two rows would be called {twice[0]!r}: give --served another label, LABEL=NAME")


def served_evaluation(
    model: str,
    data: DataFlags,
    asked: SuiteFlags,
    judged: JudgeFlags,
    compared: BaselineFlags,
    how: HowFlags,
    model_flags: ModelFlags,
    journal: Journal | None,
) -> Evaluation:
    """Measure the base that the server serves, and what --served names. Of MODEL the tokenizer alone is read.

    Answers go through the ``journal``, if there is one.
    """
    from pathlib import Path

    from steer2edit.data.templates import check_arguments, note_unread
    from steer2edit.data.tokens import token_ids
    from steer2edit.engines.server_client import ServerClient
    from steer2edit.engines.server_engine import ServerEngine
    from steer2edit.evaluation.served import (
        CountingEngine,
        KeptServer,
        ServedModel,
        evaluate_served,
        note_unmeasured,
        with_instruction,
    )
    from steer2edit.notices import notice
    from steer2edit.pairs.kept_engine import KeptEngine
    from steer2edit.pairs.writing import BATCH

    questions = asked.read_questions(data)
    check_arguments(data.template_arguments)
    choice = judged.choice(data)
    tokenizer = _tokenizer(model, model_flags)
    note_unread(tokenizer, data.template_arguments)
    clients: dict[str, ServerClient] = {}

    def engine(url: str, name: str | None, flag: str, bare: bool = False) -> ServerEngine:
        if url not in clients:
            clients[url] = ServerClient(url, **judged.asked())
        return ServerEngine(
            clients[url],
            model=name,
            chat_template_kwargs=data.template_arguments,
            bare=bare,
            count=lambda text: len(token_ids(tokenizer, [text], False)[0]),
            flag=flag,
        )

    def kept(one: ServerEngine) -> CountingEngine:
        return one if journal is None else KeptServer(one, journal)

    assert how.url is not None
    server = engine(how.url, how.server_model, "--server-model", bare=True)
    base = kept(server)
    served: list[ServedModel] = []
    for text in how.served:
        one = _Name.read(text)
        there = engine(one.url or how.url, one.model, f"--served {one.label}={one.url}#NAME")
        if there.place == server.place:
            notice(f"{one.label} is the base itself: {server.model} of {how.url}")
        served.append(ServedModel(one.label, kept(there), note=there.adapter or there.model))
    suite = judged.suite(
        asked.written_suite(questions, data),
        choice,
        data,
        base,
        model_flags,
        lambda one: one if journal is None else KeptEngine(one, journal),
    )
    note_unmeasured(suite, how.split)
    if journal is None and suite.answers(how.split) * (1 + len(served)) > BATCH:
        notice("what is answered is lost where this run is killed: with -o FILE it would go on")
    if compared.told:
        served = with_instruction(base, served, data.instruction(compared.told))
    name = " + ".join(source.name for source in data.sources()) or None
    context = {"model": Path(model).name, "fingerprint": None, "behavior": name}
    return evaluate_served(base, served, suite, tokenizer, split=how.split, context=context, progress=progress_bar())


@contextmanager
def kept_answers(out: Path | None) -> Iterator[Journal | None]:
    """The journal of an evaluation that goes to ``out``, beside it; None where it goes nowhere.

    It is removed when the block ends well: then the evaluation holds the answers, and whatever is served later under the same
    name is asked anew. No other run can write ``out`` meanwhile.
    """
    from steer2edit.files.locks import claimed
    from steer2edit.notices import notice
    from steer2edit.pairs.journal import Journal

    if out is None:
        yield None
        return
    path = out.expanduser().with_name(f"{out.name}{_JOURNAL}")
    otherwise = f"give -o another file, or remove {path.name}"
    removable = False
    with claimed([path]):
        try:
            with Journal(path, {"kind": "evaluation of what is served"}, otherwise=otherwise) as journal:
                if len(journal):
                    left = count_of(len(journal), "answer or judgement", "answers and judgements")
                    notice(
                        f"an interrupted run left {left} in {path}, which are not asked for again; remove it to begin anew"
                    )
                try:
                    yield journal
                    removable = True
                finally:
                    removable = removable or not len(journal)
        finally:
            if removable:
                path.unlink(missing_ok=True)


def _tokenizer(model: str, flags: ModelFlags) -> Any:
    """The tokenizer of a model's folder, or of one on the Hub."""
    from pathlib import Path

    from steer2edit.errors import CheckpointError
    from steer2edit.files.hub import fetch, read_reference
    from steer2edit.runtime.model import load_tokenizer

    # a reference that names another revision than --revision does is refused
    reference = None if Path(model).expanduser().exists() else read_reference(model, flags.revision)
    folder = fetch(model if reference is None else str(reference), only=_TOKENIZER)
    if not folder.is_dir():
        raise CheckpointError(f"{model} does not exist; expected a model's folder, or its id on the Hub")
    return load_tokenizer(folder, flags.trust_remote_code)
