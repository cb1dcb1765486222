"""What remains of an edit in a quantised model, format by format.

    python benchmarks/quantised.py MODEL --behavior formal --behavior concise --kl 0.1 --gguf
    python benchmarks/quantised.py MODEL --behavior formal --gguf --llama-cpp VENV/bin/python libllama.so

The default edit is brought to the KL on the model's own chat answers. Then three models are measured in each format:

- a: the base in the format.
- b: the edited checkpoint in the format, which is "edit, then quantise".
- c: the base in the format with the exact edit beside it, by hooks, which is "LoRA over a quantised base".

The attribute is the margin in nats per token, or the answers' length in tokens where a behaviour has prompts alone, on held-out
questions of the reporting half. What an edit is worth in a format is b - a or c - a, paired by question; the first row has that
of the unquantised model. KL is in nats per token of chat: of a from the base, of b and c from the edited model. In each edited
matrix, Q(W + ΔW) - Q(W) is compared with ΔW: the share of ΔW that is kept along itself, the cosine, and the relative norm, as
means over matrices. Intervals are bootstrap 95 %.

Models compute in --dtype, so that a format's numbers are rounded to it once more. ``weight_formats.py`` has the formats.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import weight_formats as formats
from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.bootstrap import estimate
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.questions import Question, take
from steer2edit.engines.own_answers import own_answers
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.metrics import Preference
from steer2edit.methods import make_plan, steering
from steer2edit.plan import EditPlan, LowRank
from steer2edit.progress import bar, silent
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts, packaged_prompts
from steer2edit.strength.settle import settle_strength

Values = Sequence[float]
UNQUANTISED = "unquantised"
HEADS = (
    *("format", "a - base", "edit: b - a", "adapter: c - a", "KL of a", "KL of b", "KL of c"),
    *("ΔW kept", "cosine", "norm"),
)


@dataclass(frozen=True)
class Case:
    """One behaviour's plan on a loaded model, the checkpoint with it, the questions, and the texts of the cost."""

    loaded: LoadedModel
    plan: EditPlan
    folder: Path
    questions: Sequence[Question]
    tokens: int
    base_text: NeutralText
    edited_text: NeutralText

    def attribute(self, loaded: LoadedModel) -> Values:
        """A value for each question of a model, with whatever hooks are on it."""
        if self.questions[0].positive:
            return Preference(self.questions)._margins(loaded, [q.prompt for q in self.questions], silent)
        return Answers(self.questions, max_new_tokens=self.tokens).measure(loaded).samples["length"].values


def case_of(checkpoint: Checkpoint, loaded: LoadedModel, name: str, work: Path, options: argparse.Namespace) -> Case:
    """The default edit at the KL, and its checkpoint."""
    behavior = Behavior.named(name)
    if options.limit is not None:
        behavior = behavior.limited(options.limit)
    answers = own_answers(loaded, packaged_prompts(options.rows), fingerprint=loaded.fingerprint, progress=bar)
    text = NeutralText(loaded, answers, progress=bar)
    scoring = Scoring(checkpoint, loaded.spec, capture_statistics(loaded, checkpoint, behavior, progress=bar))
    plan = settle_strength(
        loaded,
        make_plan(scoring, options=steering.Options(sites=options.sites)),
        kl_budget=options.kl,
        neutral=NeutralTexts(text),
    )
    emit(plan, checkpoint, loaded.spec, "checkpoint", work / "edited")
    with edited(loaded, plan):
        edited_text = NeutralText(loaded, answers)
    ordered = sorted(take(builtin_questions(name) or [], "report"), key=lambda q: q.digest[::-1])
    pairs = [q for q in ordered if q.positive] or ordered
    return Case(loaded, plan, work / "edited", pairs[: options.questions], options.answer_tokens, text, edited_text)


def holding(loaded: LoadedModel, weights: formats.Weights) -> LoadedModel:
    """A copy of the model with other weights, in its own dtype."""
    model = copy.deepcopy(loaded.model)
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            stored[name].copy_(value)
    return replace(loaded, model=model, fingerprint=None)


def stored_changes(case: Case, before: formats.Weights, after: formats.Weights) -> dict[str, float]:
    """Means over the edited matrices of what the format made of ΔW. Raises ValueError for edits that are not of one matrix."""
    found: list[tuple[float, float, float]] = []
    for edit in case.plan.edits:
        site = case.loaded.spec.owners[edit.tensor]
        if not isinstance(edit, LowRank) or site.expert is not None or f"{site.module}.weight" not in before:
            raise ValueError(
                f"{edit.tensor} is not a linear layer's own low-rank edit, which is all that is compared here"
            )
        name = f"{site.module}.weight"
        planned, stored = edit.dense().double(), after[name].double() - before[name].double()
        along, size, norm = (stored * planned).sum(), planned.norm(), stored.norm()
        found.append((float(along / size**2), float(along / (size * norm).clamp(min=1e-30)), float(norm / size)))
    kept, cosine, relative = (sum(column) / len(found) for column in zip(*found, strict=True))
    return {"kept": kept, "cosine": cosine, "norm": relative}


def rows(
    case: Case, wanted: Mapping[str, formats.Convert], bases: Mapping[str, formats.Weights], work: Path
) -> Iterator[list[str]]:
    """The table's rows: the model as it is, then each format. ``bases`` are the base's weights in each."""
    loaded = case.loaded
    theirs = load_weights(case.folder, Runtime(dtype=str(loaded.model.dtype).removeprefix("torch.")))
    base = case.attribute(loaded)
    for name, convert in wanted.items():
        mine, other = bases[name], convert(theirs, case.folder, work / name)
        a, b = holding(loaded, mine), holding(loaded, other)
        of_a, kl_a = case.attribute(a), case.base_text.measure(a)
        of_b, kl_b = case.attribute(b), case.edited_text.measure(b)
        with edited(a, case.plan):
            of_c, kl_c = case.attribute(a), case.edited_text.measure(a)
        change = stored_changes(case, mine, other)
        yield [
            *(name, _paired(of_a, base), _paired(of_b, of_a), _paired(of_c, of_a)),
            *(f"{one.kl:.4f}" for one in (kl_a, kl_b, kl_c)),
            *(f"{change['kept']:.3f}", f"{change['cosine']:.3f}", f"{change['norm']:.2f}"),
        ]


def _paired(values: Values, others: Values) -> str:
    return str(estimate([a - b for a, b in zip(values, others, strict=True)]))


def _formats(options: argparse.Namespace) -> dict[str, formats.Convert]:
    found = {
        UNQUANTISED: formats.of_matrices(lambda weight: weight),
        "int4, symmetric": formats.of_linear(formats.int4_symmetric),
        "int4, asymmetric": formats.of_linear(formats.int4_asymmetric),
        "int8, per row": formats.of_linear(formats.int8_rows),
    }
    if options.gguf:
        found["GGUF Q8_0"] = formats.of_matrices(formats.q8_0)
    if options.llama_cpp:
        python, library = options.llama_cpp
        found["GGUF Q4_K_M"] = formats.LlamaCpp("Q4_K_M", python, library)
    if options.only is not None:
        found = {
            name: one
            for name, one in found.items()
            if name == UNQUANTISED or any(part in name for part in options.only)
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", action="append", required=True)
    parser.add_argument("--kl", type=float, default=0.1, help="nats per token of chat (default %(default)s)")
    parser.add_argument("--questions", type=int, default=48, help="questions of a behaviour (default %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="answers of the KL (default %(default)s)")
    parser.add_argument("--limit", type=int, help="rows of the behaviour that are captured (default all)")
    parser.add_argument("--answer-tokens", type=int, default=96, help="the longest answer (default %(default)s)")
    parser.add_argument(
        "--sites", choices=("attn", "mlp", "both"), default="attn", help="what is edited (default %(default)s)"
    )
    parser.add_argument("--only", action="append", help="formats whose names hold this text; repeatable")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gguf", action="store_true", help="GGUF Q8_0 too, by the gguf library")
    parser.add_argument(
        "--llama-cpp",
        nargs=2,
        type=Path,
        metavar=("PYTHON", "LIBLLAMA"),
        help="GGUF Q4_K_M too, by llama.cpp's converter in this Python's environment, and its quantiser in this library",
    )
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    wanted = _formats(options)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        bases = {name: convert(loaded.model, checkpoint.path, work / "base" / name) for name, convert in wanted.items()}
        for behavior in options.behavior:
            case = case_of(checkpoint, loaded, behavior, work / behavior, options)
            lines = []
            for row in rows(case, wanted, bases, work / behavior):
                lines.append(row)
                print(behavior, *row, sep=" | ", file=sys.stderr, flush=True)
            print(f"{behavior}: {len(case.questions)} questions, strength {case.plan.measured.strength:.3g}")
            print(tabulate(lines, headers=HEADS, tablefmt="github", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()
