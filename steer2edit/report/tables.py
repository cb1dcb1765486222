"""Evaluations, studies and verifications as tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from steer2edit.errors import count_of
from steer2edit.evaluation.comparison import compared_rows, comparisons
from steer2edit.evaluation.metrics import attributes
from steer2edit.evaluation.served import NO_PROBABILITIES
from steer2edit.evaluation.steerability import steerability
from steer2edit.plan.measured import KL_NAMES
from steer2edit.report.differences import cell, change_cell, losses

if TYPE_CHECKING:
    from steer2edit.artefact.verify import Verification
    from steer2edit.evaluation.evaluate import Evaluation, Row
    from steer2edit.evaluation.metrics import Metric
    from steer2edit.search.study import Study


_UNITS = {
    **dict.fromkeys((KL_NAMES["chat"], KL_NAMES["answers"]), "of the base's own answers"),
    **dict.fromkeys((KL_NAMES["prose"], "KL", "perplexity"), "windows of neutral prose"),
}
"""What the metrics are means over that are not means over questions."""


def render_evaluation(found: Evaluation) -> str:
    """A table of every candidate, each metric with its interval; signs of damage; what is broken; the counts below.

    Under each edit stand its change from the base and what it does beyond each baseline, losses first.
    """
    edits, lost = compared_rows(found), []
    for row in edits:
        lost += losses(found, comparisons(found, row))
    context = found.context
    broken = [f"{row.name} breaks {'; '.join(map(str, told))}." for row in found.rows if (told := found.damages(row))]
    lines = [*broken, *lost, *([""] if lost or broken else [])]
    lines += [_table(found, [metric for metric in found.metrics if metric.role != "check"], edits), ""]
    if checks := [metric for metric in found.metrics if metric.role == "check"]:
        lines += ["Signs of damage:", "", _table(found, checks, edits), ""]
    lines.append(_measured_on(found))
    if edits:
        lines.append(
            "Changes and differences are paired by question; better and worse: the whole interval has that sign."
        )
    lines += _served_lines(context)
    for name, results in (context.get("lm_eval") or {}).items():
        lines += ["", f"lm-eval, {name}", tabulate(results, headers="keys", floatfmt=".4g")]
    return "\n".join(lines)


def breaks_line(found: Evaluation) -> str:
    """What the edit breaks of the base, by paired differences."""
    edit = next((row for row in found.rows if row.kind == "edit"), None)
    if edit is None or not any(metric.tolerance is not None for metric in found.metrics):
        return ""
    damages = found.damages(edit)
    line = "; ".join(map(str, damages)) or "nothing that was measured"
    if not found.decoding and any(damage.metric.startswith(("loops", "repetition")) for damage in damages):
        line += " (of greedy answers; --repetition-penalty 1.1 measures as small models are often served)"
    return line


def effect_line(found: Evaluation) -> str:
    """What the edit does to each metric of the behaviour, its own first: the base's value, and the edit's."""
    edit = next((row for row in found.rows if row.kind == "edit"), None)
    if edit is None:
        return ""
    told = []
    for metric in attributes(found.metrics):
        before, after = found.estimate(found.rows[0], metric.name), found.estimate(edit, metric.name)
        unit = f" {metric.unit}" if metric.unit else ""
        told.append(f"{metric.name} {before}{unit} before, {after}{unit} after, on {count_of(after.count, 'question')}")
    return "; ".join(told)


def steerable_lines(found: Evaluation) -> list[str]:
    """Whether each edit moves its behaviour more than random directions do; a warning where it does not."""
    lines = []
    for row in compared_rows(found):
        judged = steerability(found, row)
        if judged is not None:
            lines.append(str(judged) + ("" if judged.steerable else " Do not publish it as an edit of this behaviour."))
    return lines


def _table(found: Evaluation, metrics: Sequence[Metric], edits: Sequence[Row]) -> str:
    """Every candidate's values of some metrics, and under each edit its change and its differences."""
    table = []
    for row in found.rows:
        values = (str(found.estimate(row, m.name)) if m.name in row.samples else "–" for m in metrics)
        table.append([row.name, row.note, *values])
        if row in edits:
            table.append(["  change", "", *(change_cell(found, row, metric) for metric in metrics)])
            for one in comparisons(found, row):
                name = "  beyond" if one.row is row else f"  {one.row.name} beyond"
                table.append([name, one.against, *(cell(one, metric) for metric in metrics)])
    headers = ["", "", *(f"{m.name}{f' ({m.unit})' if m.unit else ''}" for m in metrics)]
    return str(tabulate(table, headers=headers, disable_numparse=True))


def _measured_on(found: Evaluation) -> str:
    """What the numbers of a table are means over."""
    names: dict[tuple[str, int], list[str]] = {}
    for metric in found.metrics:
        count = found.estimate(found.rows[0], metric.name).count
        unit = _UNITS.get(metric.name, "questions")
        names.setdefault((unit, count), []).append(metric.name)
    told = [f"{', '.join(metrics)} over {count} {unit}" for (unit, count), metrics in names.items()]
    split = found.context.get("split")
    half = f" (the half that tune {'reports on' if split == 'report' else 'selects on'})" if split else ""
    line = f"Means: {'; '.join(told)}{half}. In brackets: 95 % intervals from resampling these."
    return f"{line} {found.decoding}".rstrip()


def _served_lines(context: Mapping[str, Any]) -> list[str]:
    """What a table of served models does not hold, and who counted the tokens."""
    if "not_measured" not in context:
        return []
    counts = set(context["lengths"].values())
    return [
        f"Answers by {context['server']['url']}; lengths are counted by {' and '.join(sorted(counts))}.",
        f"Not measured: {', '.join(context['not_measured'])} ({NO_PROBABILITIES}).",
    ]


def render_study(done: Study) -> str:
    """The front on the selection split, what the knee is, and the report's table."""
    settings, result = done.result.settings, done.result
    attribute, utility = settings["attribute"]["name"], settings["utility"]["name"]
    front = [trial for trial in result.trials if trial.number in result.front]
    others = [name for name in KL_NAMES.values() if front and all(name in trial.checks for trial in front)]
    rows = []
    for trial in sorted(result.trials, key=lambda trial: trial.kl):
        if trial.number in result.front and trial.attribute is not None and trial.utility is not None:
            a, u = (f"{v['value']:.3g} [{v['low']:.3g}, {v['high']:.3g}]" for v in (trial.attribute, trial.utility))
            params = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in trial.params.items())
            costs = [f"{trial.checks[name]:.3g}" for name in others]
            rows.append([trial.number, a, u, *costs, params, "knee" if trial.number == result.knee else ""])
    states = [trial.state for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    base = settings["base"]
    parts = [
        f"{count_of(len(states), 'trial')} ({counts}). The base's {attribute}: {base[attribute]:.3g}.",
        "",
        "The front (plans that no other plan beats in both metrics), on the questions for selection:",
        "",
        tabulate(rows, headers=["trial", attribute, utility, *others, "", ""], disable_numparse=True),
    ]
    if done.evaluation is not None:
        parts += ["", "On the questions for reporting:", "", render_evaluation(done.evaluation)]
    kept = [
        "study.json",
        *(["knee.plan.safetensors", "front/"] if rows else []),
        *(["evaluation.json"] if done.evaluation else []),
    ]
    parts += ["", f"Written: {done.folder} ({', '.join(kept)})", "", "Next:"]
    parts.append(f"  steer2edit report {shlex.quote(str(done.folder))} -o report.html")
    if rows:
        parts.append(f"  steer2edit show {shlex.quote(str(done.folder / 'knee.plan.safetensors'))}")
    return "\n".join(parts)


def render_verification(result: Verification) -> str:
    """What was checked and what it gave, one line each; then rounding, where something was rounded."""
    lines = [f"base     {result.base}", f"bytes    {count_of(result.tensors, 'tensor')} compared"]
    if result.numbers:
        lines.append(f"numbers  {result.verdict}")
        if experts := result.numbers.get("experts"):
            lines.append(f"experts  {_expert_check(experts)}")
    if result.rounding:
        kept = [r.along_v for r in result.rounding]
        worst = max(result.rounding, key=lambda r: r.relative)
        lines.append(
            f"rounding {sum(kept) / len(kept):.2%} of the edit kept along v_hat (least {min(kept):.2%}); "
            f"largest relative error {worst.relative:.2%}, cosine {worst.cosine:.5f}, at {worst.tensor}"
        )
    lines += [f"note     {note}" for note in result.notes[:20]]
    lines += [f"problem  {problem}" for problem in result.problems[:50]]
    lines.append("ok" if result.ok else f"FAILED: {count_of(len(result.problems), 'problem')}")
    return "\n".join(lines)


def _expert_check(found: Mapping[str, Any]) -> str:
    told = [f"over {found['probe_tokens']} tokens"]
    if "selected" in found:
        told.append(f"{found['selected']:.2%} choose a masked one")
    if "forced" in found:
        told.append(f"at least {found['forced']:.2%} choose each forced one")
    if "reference_difference" in found:
        told.append(f"logits within {found['reference_difference']:.2g} of the base that cannot see the masked ones")
    return "; ".join(told)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
