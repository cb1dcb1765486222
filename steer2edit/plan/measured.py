"""Measurements of an edit: its strength, its cost on answers and on prose, and the search's steps.

Plans and receipts hold it as one JSON object. What was read is written again as it was, key by key, because a plan's hash
is over these bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from steer2edit.bootstrap import Estimate
from steer2edit.files.schema import MAYBE, NUMBER

TextKind = Literal["chat", "answers", "prose"]
"""The neutral texts: a model's own answers to everyday prompts, in chat or, of a base model, in plain text; and running prose."""
KL_NAMES: Mapping[TextKind, str] = {"chat": "KL in chat", "answers": "KL on answers", "prose": "KL on prose"}
"""The name of the KL on each kind of text, the same in every table."""
TEXT_NAMES: Mapping[TextKind, str] = {
    "chat": "the base's own answers",
    "answers": "the base's own answers in plain text",
    "prose": "neutral prose",
}
LARGEST_STRENGTH = 1e6
"""Strengths beyond it multiply nothing but rounding: behaviours meet their budgets at 0.1 to 1e5, noise at 1e7 and more."""


@dataclass(frozen=True)
class Divergence:
    """``kl`` in nats per token, with its bootstrap 95 % interval over the text's windows or answers.

    The perplexities are those of the base and of the edited model on that text.

    ``quadratic`` is ``½ E Var_p(log q - log p)``, which KL approaches as an edit gets small. It is a sum of squares, so it can be
    measured at a strength far below the one that is sought, where the terms of KL cancel. Only a quick look at a part of the
    text has it.
    """

    kl: float
    low: float
    high: float
    tokens: int
    base_perplexity: float
    perplexity: float
    quadratic: float | None = None

    @property
    def estimate(self) -> Estimate:
        """The KL with its interval."""
        return Estimate(self.kl, self.low, self.high, self.tokens)


def is_kl(metric: str) -> bool:
    """Whether a metric of an evaluation is a KL; older evaluations have one, on prose."""
    return metric == "KL" or metric in KL_NAMES.values()


@dataclass(frozen=True)
class ClassStrength:
    """One class of writers (attention or MLPs) that met a KL budget of its own: its strength, budget and KL."""

    strength: float
    kl_budget: float
    kl: float


_DIVERGENCE = tuple(one.name for one in fields(Divergence))
_CLASS: Any = {one.name: NUMBER for one in fields(ClassStrength)}
_OTHER: Any = {
    "strength?": MAYBE,
    "kl_budget?": MAYBE,
    "selected_on?": [str],
    "classes?": {str: _CLASS},
    "steps?": [[NUMBER]],
    "trial?": int,
    "params?": {},
    "aim?": {
        **{"metric": str, "aim": NUMBER, "value": NUMBER, "base": NUMBER, "steps": [[NUMBER]]},
        "repetition_penalty?": NUMBER,
    },
}
_COST: Any = {
    **dict.fromkeys(("kl", "low", "high", "base_perplexity", "perplexity"), NUMBER),
    "tokens": int,
    "quadratic?": MAYBE,
}
# what belongs to a measured KL comes with it; plans of older versions have one KL, on prose, among the other keys
MEASURED: Any = (
    {**_OTHER, "strength": NUMBER, **_COST, "costs?": ()},
    {**_OTHER, "strength": NUMBER, "kl?": (), "costs": {str: _COST}, "budget_text": str},
    {**_OTHER, "kl?": (), "costs?": ()},
)
"""The kind of a measured edit's JSON, for :func:`files.schema.check`."""


@dataclass(frozen=True)
class Measured:
    """What is known of an edit. ``strength`` is already in the plan's edits; everything is None or empty where not measured.

    ``costs`` holds the divergence on each kind of neutral text, ``kl_budget`` the largest KL that was allowed on the text
    ``budget_text`` (None for a strength that was given), ``steps`` the search's ``(strength, kl)`` in order. ``trial`` and
    ``params`` say which proposal of a study it is, and ``selected_on`` holds digests of the prompts that it was chosen by.
    ``aim`` is what the strength was to reach: a metric, its value and the base's. ``more`` are keys of other versions.
    """

    strength: float | None = None
    kl_budget: float | None = None
    budget_text: TextKind = "prose"
    classes: Mapping[str, ClassStrength] = field(default_factory=dict)
    costs: Mapping[TextKind, Divergence] = field(default_factory=dict)
    steps: tuple[tuple[float, float], ...] | None = None
    trial: int | None = None
    params: Mapping[str, Any] | None = None
    selected_on: tuple[str, ...] = ()
    aim: Mapping[str, Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    _keys: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _empty: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @property
    def divergence(self) -> Divergence | None:
        """The cost on the text that budgets are on: in chat for chat models, else on prose."""
        return self.costs.get(self.budget_text)

    @property
    def kl(self) -> float | None:
        """The KL from the base on that text, in nats per token."""
        return None if self.divergence is None else self.divergence.kl

    def to_json(self) -> dict[str, Any]:
        """As plans and receipts hold it."""
        # what was read in the form of older versions is written in it
        flat = "kl" in self._keys and self.costs.keys() == {"prose"}
        values: dict[str, Any] = {
            "strength": self.strength,
            "kl_budget": self.kl_budget,
            "classes": {name: asdict(one) for name, one in self.classes.items()},
            **(asdict(self.costs["prose"]) if flat else self._costs()),
            "steps": None if self.steps is None else [list(step) for step in self.steps],
            "trial": self.trial,
            "params": None if self.params is None else dict(self.params),
            "selected_on": list(self.selected_on),
            "aim": None if self.aim is None else dict(self.aim),
            **self.more,
        }
        # a settled strength says too that it had no budget and no search, and older KLs that they have no quadratic form
        shown = set(self._empty)
        shown |= {"kl_budget", "steps"} if self.steps is not None else set()
        shown |= {"quadratic"} if flat else set()
        keys = dict.fromkeys([*self._keys, *values])
        return {key: values[key] for key in keys if key in values and (key in shown or values[key] not in _EMPTY)}

    def _costs(self) -> dict[str, Any]:
        if not self.costs:
            return {}
        costs = {kind: asdict(one) for kind, one in self.costs.items()}
        for one in costs.values():
            if one["quadratic"] is None:
                del one["quadratic"]
        return {"budget_text": self.budget_text, "costs": costs}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Measured:
        """What :meth:`to_json` gave. Raises ValueError or TypeError for what :data:`MEASURED` does not allow."""
        own = {key: described[key] for key in ("strength", "kl_budget", "trial", "params", "aim") if key in described}
        steps = described.get("steps")
        costs: dict[TextKind, Divergence] = {}
        if "kl" in described:
            costs["prose"] = Divergence(**{key: described[key] for key in _DIVERGENCE if key in described})
        for kind, cost in described.get("costs", {}).items():
            costs[kind] = Divergence(**{key: cost[key] for key in _DIVERGENCE if key in cost})
        budget_text = described.get("budget_text", "prose")
        if costs and budget_text not in costs:
            raise ValueError(f"the budget's text is {budget_text!r}, and there is no cost on it")
        return cls(
            **own,
            budget_text=budget_text,
            classes={name: ClassStrength(**one) for name, one in described.get("classes", {}).items()},
            costs=costs,
            steps=None if steps is None else tuple((strength, kl) for strength, kl in steps),
            selected_on=tuple(described.get("selected_on", ())),
            more={key: value for key, value in described.items() if key not in _KEYS},
            _keys=tuple(described),
            _empty=frozenset(key for key, value in described.items() if value in _EMPTY),
        )


_EMPTY: tuple[Any, ...] = (None, [], {})
_KEYS = {*(one.name for one in fields(Measured)), *_DIVERGENCE} - {"more", "_keys", "_empty"}
