"""What was tried beside the options of the default method, and is not one of them: plans for solver_options.py.

- centred: second moments of prose and chat about their means.
- floor .001 and .1: the part of the mean diagonal that is added, .01 in the method.
- cleared of relabellings: v without what lies along the differences of randomly relabelled data, softly or wholly.
- weighed by effect: each matrix's edit times g / F, the gradient of the contrast margin over the Fisher information on the
  model's own answers; "MLPs too" with those of MLPs.
- whole moments: second moments between all heads of a layer, or all neurons of an MLP (beside the attention's usual edit, or
  alone).
- own answers: the base's long answers to the contrast data's prompts as a further source of moments, a fifth of them; with a mean
  effect of one on them too, or on them alone.
- second pass: captured again under half the default edit at the strength that meets the KL, and solved again: in its place, with
  the first capture's v, or in equal parts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from steer2edit.architecture import MatrixRole
from steer2edit.capture.background import chats, own_chat, prose
from steer2edit.capture.populations import SOURCE_OF, Source
from steer2edit.capture.run import capture
from steer2edit.data import contrast
from steer2edit.data.behavior import Behavior
from steer2edit.data.tokens import Encoded
from steer2edit.engines.own_answers import own_answers
from steer2edit.methods import steering
from steer2edit.methods._solver import Energy, least_energy
from steer2edit.plan import EditPlan, LowRank, merge
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.distributed import ALONE
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.meet import meet

WEIGHTS: dict[Source, float] = {"contrast": 0.2, "background": 0.4, "chat": 0.4}
OWN_WEIGHTS: dict[Source, float] = {"contrast": 0.1, "background": 0.35, "chat": 0.35, "keep": 0.2}
PAIRS, ANSWERS, DRAWS = 40, 60, 2
OWN_PROMPTS, OWN_TOKENS = 64, 160


def plans(
    loaded: LoadedModel, scoring: Scoring, behavior: Behavior, text: NeutralText
) -> Mapping[str, Callable[[float], EditPlan]]:
    """By name, what makes the plan for a KL on ``text``."""
    both = steering.Options(sites="both")
    every = cache(partial(examples, loaded, behavior))
    whole = cache(lambda kind: whole_moments(loaded, every(), kind))
    second = cache(lambda kl: again(loaded, scoring, every(), text, kl))
    first = cache(lambda: steering.plan(scoring))
    own = cache(lambda: with_own_answers(loaded, scoring, behavior, every()))

    def with_mlps(eps: float) -> EditPlan:
        mlps = solved(scoring, eps=eps, whole=whole(MatrixRole.MLP_OUT))
        return replace(mlps, edits=(*first().edits, *mlps.edits))

    return {
        "centred": lambda _: solved(scoring, centred=True),
        "floor .001": lambda _: solved(scoring, eps=0.001),
        "floor .1": lambda _: solved(scoring, eps=0.1),
        "cleared of relabellings, softly": lambda _: steering.plan(cleared(scoring, 1.0)),
        "cleared of relabellings": lambda _: steering.plan(cleared(scoring, 1e-6)),
        "weighed by effect": lambda _: weighed(loaded, first(), every()),
        "weighed by effect, MLPs too": lambda _: weighed(loaded, steering.plan(scoring, both), every()),
        "eases off": lambda _: solved(scoring, on_positive=0.75),
        "eases off more": lambda _: solved(scoring, on_positive=0.5),
        "whole moments": lambda _: solved(scoring, whole=whole(MatrixRole.ATTN_OUT)),
        "whole moments of MLPs": lambda _: solved(scoring, whole=whole(MatrixRole.MLP_OUT)),
        "MLPs too, whole moments": lambda _: with_mlps(0.01),
        "MLPs too, whole moments, floor .0001": lambda _: with_mlps(0.0001),
        "own answers": lambda _: solved(own(), weights=OWN_WEIGHTS),
        "own answers, effect of one": lambda _: solved(own(), weights=OWN_WEIGHTS, on_own=(1.0, 1.0)),
        "own answers, effect of one there alone": lambda _: solved(own(), weights=OWN_WEIGHTS, on_own=(None, 1.0)),
        "second pass": lambda kl: steering.plan(second(kl)),
        "second pass, the first's v": lambda kl: steering.plan(with_outputs_of(second(kl), scoring)),
        "two passes": lambda kl: merge([first(), steering.plan(second(kl))], [0.5, 0.5]),
    }


def with_own_answers(loaded: LoadedModel, scoring: Scoring, behavior: Behavior, read: Sequence[Encoded]) -> Scoring:
    """The scores with the base's own answers to the contrast data's prompts as the source "keep"."""
    prompts = list(dict.fromkeys(one.prompt for one in behavior.examples))[:OWN_PROMPTS]
    own = own_answers(loaded, prompts, fingerprint=loaded.fingerprint, max_new_tokens=OWN_TOKENS)
    statistics = capture(loaded, [*read, *chats(own, "keep")], source=dict(scoring.statistics.source))
    return Scoring(scoring.checkpoint, scoring.spec, statistics)


def examples(loaded: LoadedModel, behavior: Behavior) -> list[Encoded]:
    """What a capture reads."""
    answers = own_chat(loaded, loaded.fingerprint, ALONE)
    found = behavior.encode(loaded.tokenizer, loaded.context)
    return [*found, *prose(loaded, [contrast.background_text()], "background"), *chats(answers, "chat")]


def solved(
    scoring: Scoring,
    *,
    centred: bool = False,
    eps: float = 0.01,
    whole: Mapping[tuple[str, Source], torch.Tensor] | None = None,
    on_positive: float | None = None,
    weights: Mapping[Source, float] = WEIGHTS,
    on_own: tuple[float | None, float | None] = (1.0, None),
) -> EditPlan:
    """The default's plan with other moments; ``whole`` [in, in] by site and source, for the sites that it has.

    ``on_positive`` is the mean effect on the positive class, where the mean over both classes has 1. ``on_own`` are the mean
    effects that are asked for on the contrast data and on the source "keep", None for no demand.
    """
    plain = steering.plan(scoring)
    statistics, layers = scoring.statistics, scoring.spec.layers
    there: list[Source] = [source for source in weights if source == "contrast" or statistics.examples[source]]
    keys = {key for key, _ in whole} if whole is not None else None
    sites = [
        site
        for site in scoring.spec.sites
        if site.layer >= layers // 2 and (site.role.kind is MatrixRole.ATTN_OUT if keys is None else site.key in keys)
    ]
    edits = []
    for one in scoring.score(sites):
        key, x = one.site.key, one.x_bar.double()
        carries = one.table.stable.double().repeat_interleave(one.site.in_features // one.site.components)
        parts: dict[Source, torch.Tensor] = {}
        for source in there:
            S = statistics.block_moments(key, source).double() if whole is None else whole[key, source].double()[None]
            if centred and source != "contrast":
                mean = statistics.mean(key, "input", source).view(len(S), -1)
                S = S - mean[:, :, None] * mean[:, None, :]
            parts[source] = S
        total = Energy.of(parts, weights, eps)
        if whole is not None:  # what does not carry is not coupled to what does
            mask = carries[:, None] * carries[None, :]
            total = Energy((total.moments[0] * mask + torch.diag(1 - carries))[None])
        asked: list[tuple[torch.Tensor, float | None]] = [(x, on_own[0])]
        asked += [
            (statistics.mean(key, "input", source), on_own[1] if source == "keep" else 0.0)
            for source in there
            if source != "contrast"
        ]
        inputs = [mean * carries for mean, effect in asked if effect is not None]
        effects = [effect for _, effect in asked if effect is not None]
        if on_positive is not None:
            apart = statistics.mean(key, "input", "positive") - statistics.mean(key, "input", "negative")
            inputs, effects = [*inputs, apart * carries], [*effects, 2 * (on_positive - 1)]
        a = least_energy(total.inverse, inputs, effects) if bool((x * carries).any()) else None
        if a is not None:
            edits.append(LowRank(one.site.matrix, one.v_hat[:, None].clone(), (one.size * a).float()[None]))
    return replace(plain, edits=tuple(edits), scores={})


def cleared(scoring: Scoring, ridge: float) -> Scoring:
    """The scores with v cleared of the relabelled differences, each of length one."""
    statistics = scoring.statistics
    moments = dict(statistics.moments)
    for site in scoring.spec.sites:
        key = site.vector_key
        A = statistics.resamples("shuffled", key, "output").difference().double().T
        A = A / A.norm(dim=0).clamp(min=1e-12)
        v = statistics.difference(key)
        lost = A @ torch.linalg.solve(A.T @ A + ridge * torch.eye(A.shape[1], dtype=A.dtype), A.T @ v)
        one = statistics.moments[key, "output", "positive"]
        moments[key, "output", "positive"] = replace(one, mean=one.mean - lost)
    return Scoring(scoring.checkpoint, scoring.spec, replace(statistics, moments=moments))


def weighed(loaded: LoadedModel, plan: EditPlan, read: Sequence[Encoded]) -> EditPlan:
    """Each edit times g / F, both by gradients with respect to its strength."""
    edits = [edit for edit in plan.edits if isinstance(edit, LowRank)]
    strengths = torch.zeros(len(edits), requires_grad=True)
    negative = {one.row: one for one in read if one.label == "negative"}
    pairs = [(one, negative[one.row]) for one in read if one.label == "positive" and one.row in negative]
    pairs = pairs[:: max(1, len(pairs) // PAIRS)][:PAIRS]
    answers = [one for one in read if one.label == "chat"] or [one for one in read if one.label == "background"]
    answers = answers[:: max(1, len(answers) // ANSWERS)][:ANSWERS]
    gain, fisher = torch.zeros(len(edits)), torch.zeros(len(edits))
    generator = torch.Generator().manual_seed(0)

    def log_probabilities(one: Encoded) -> torch.Tensor:
        states = loaded.body()(input_ids=torch.tensor([one.ids]), use_cache=False)[0][0, one.start - 1 : -1]
        return torch.log_softmax(loaded.model.get_output_embeddings()(states).float(), dim=1)

    with ExitStack() as stack:
        for index, edit in enumerate(edits):
            module = loaded.module(loaded.spec.owners[edit.tensor])
            hook = partial(_pushed, strengths, index, edit)
            stack.callback(module.register_forward_hook(hook).remove)
        for pair in pairs:
            for one, sign in zip(pair, (1, -1), strict=True):
                gold = torch.tensor(one.ids[one.start :])[:, None]
                mean = log_probabilities(one).gather(1, gold).mean()
                gain += sign * torch.autograd.grad(mean, strengths)[0] / len(pairs)
        for one in answers:
            logs = log_probabilities(one)
            for _ in range(DRAWS):
                drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                fisher += torch.autograd.grad(logs.gather(1, drawn).sum(), strengths, retain_graph=True)[0].square()
    weights = (gain / (fisher + 0.1 * fisher.mean())).clamp(min=0)
    weights = weights / weights.mean()
    return replace(plan, edits=tuple(e.scaled(float(w)) for e, w in zip(edits, weights, strict=True) if w > 1e-6))


def _pushed(strengths: torch.Tensor, index: int, edit: LowRank, _module: Any, inputs: Any, output: Any) -> Any:
    return (output.float() + strengths[index] * (inputs[0].float() @ edit.A.T) @ edit.B.T).to(output.dtype)


def whole_moments(
    loaded: LoadedModel, read: Sequence[Encoded], kind: MatrixRole
) -> dict[tuple[str, Source], torch.Tensor]:
    """``E[x xᵀ]`` of whole inputs of the deeper half's writers of one kind, by site and source; [in, in] float32."""
    sites = [s for s in loaded.spec.sites if s.role.kind is kind and s.layer >= loaded.spec.layers // 2]
    examples_of: dict[Source, int] = {}
    for one in read:
        source = SOURCE_OF[one.label]
        examples_of[source] = examples_of.get(source, 0) + 1
    found: dict[tuple[str, Source], torch.Tensor] = {}
    spans: dict[Source, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(key: str, _module: Any, inputs: Any, _output: Any) -> None:
        for source, (places, weights) in spans.items():
            x = inputs[0].flatten(0, -2)[places].float() * weights[:, None].sqrt()
            part = x.T @ x / examples_of[source]
            found[key, source] = found[key, source] + part if (key, source) in found else part

    with ExitStack() as stack, torch.inference_mode():
        for site in sites:
            stack.callback(loaded.module(site).register_forward_hook(partial(add, site.key)).remove)
        for batch in batches([len(one.ids) for one in read], 2048):
            chosen = [read[i] for i in batch]
            ids, mask = pad_right([one.ids for one in chosen], loaded.padding, loaded.device)
            spans.clear()
            for source in {SOURCE_OF[one.label] for one in chosen}:
                rows = [(row, one) for row, one in enumerate(chosen) if SOURCE_OF[one.label] == source]
                places = [row * ids.shape[1] + p for row, one in rows for p in range(one.start - 1, len(one.ids) - 1)]
                weights = [1 / (len(one.ids) - one.start) for _, one in rows for _ in range(len(one.ids) - one.start)]
                spans[source] = torch.tensor(places), torch.tensor(weights)
            loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


def again(loaded: LoadedModel, scoring: Scoring, read: Sequence[Encoded], text: NeutralText, kl: float) -> Scoring:
    """The scores of a capture under half of the default edit at the strength that meets a KL."""
    first = steering.plan(scoring)
    strength = meet(partial(edited, loaded, first), text, kl).strength
    with edited(loaded, first, strength / 2):
        statistics = capture(loaded, read, source=dict(scoring.statistics.source))
    return Scoring(scoring.checkpoint, scoring.spec, statistics)


def with_outputs_of(scoring: Scoring, other: Scoring) -> Scoring:
    """The inputs of one capture with the outputs, and so with the v, of another."""
    theirs = other.statistics
    moments = {
        key: theirs.moments[key] if key[1] == "output" else one for key, one in scoring.statistics.moments.items()
    }
    resampled = {
        key: theirs.resampled[key] if key[2] == "output" else one for key, one in scoring.statistics.resampled.items()
    }
    mixed = replace(scoring.statistics, moments=moments, resampled=resampled)
    return Scoring(scoring.checkpoint, scoring.spec, mixed)


if __name__ == "__main__":
    print(__doc__)
