"""The model card of an artefact or a plan.

It says what the artefact is, how to load it, what changed, and what it does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer2edit import targets
from steer2edit.architecture.wrappers import TEXT_ALONE
from steer2edit.files.layout import CARD
from steer2edit.files.untrusted import read_bytes
from steer2edit.formatting import divergence, pairs
from steer2edit.lowering import HubEntry, Place, Snippet
from steer2edit.plan import Base, Measured
from steer2edit.plan.measured import KL_NAMES, TEXT_NAMES

if TYPE_CHECKING:
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import EditPlan

_MASK = "experts"
_LISTED = 64
_CARD_BYTES = 4 << 20
# the task of a base whose card names none, by a part of its config, and what loads models of a task
_TASKS = {"vision_config": "image-text-to-text", "audio_config": "audio-text-to-text"}
_AUTO_CLASSES = {
    "image-text-to-text": "AutoModelForImageTextToText",
    "audio-text-to-text": "AutoModelForMultimodalLM",
    "any-to-any": "AutoModelForMultimodalLM",
}
_PLAN = "plan"
_PLAN_ENTRY = HubEntry(
    "A plan of steer2edit: the low-rank edits that compile a steering vector into the base's weights, from which a checkpoint "
    "or an adapter is made.",
    "adapter",
    "steer2edit",
    ("steer2edit-plan",),
)


def model_card(
    receipt: Mapping[str, Any],
    *,
    repository: str | None = None,
    sections: Sequence[str] = (),
) -> str:
    """The text of ``README.md``, with the Hub's metadata block, from a receipt.

    ``repository`` is where it goes, once that is known. ``sections`` are further paragraphs, such as those of
    ``report.card_section.tradeoff``.
    """
    base, target, measured = receipt["base"], receipt["target"], Measured.from_json(receipt["measured"])
    behaviour = receipt["data"].get("name") or "a steering vector"
    total = sum((change["norm"] or 0.0) ** 2 for change in receipt["changed"]) ** 0.5
    changed = f"{len(receipt['changed'])}" + (f", ‖ΔW‖ = {total:.4g} in all" if total else "")
    rows = [
        ("Base", base["name"] + (f" at {base['revision']}" if base["revision"] else "")),
        ("Base fingerprint", base["fingerprint"]),
        *([("Base format", quantised["format"])] if (quantised := receipt["data"].get("quantised")) else []),
        ("Behaviour", behaviour),
        ("Method", method_of(receipt["method"])),
        ("Changed tensors", changed),
        ("Exactness", receipt["exactness"]),
        ("Plan, SHA-256", receipt["plan"]["sha256"]),
    ]
    for kind, cost in measured.costs.items():
        kl = f"{divergence(cost.estimate)} from the base, over {cost.tokens} tokens of {TEXT_NAMES[kind]}"
        rows.append((KL_NAMES[kind], kl))
    if prose := measured.costs.get("prose"):
        rows.append(("Perplexity of prose", f"{prose.base_perplexity:.3f} before, {prose.perplexity:.3f} after"))
    rows.append(("Made with", pairs(receipt["versions"])))
    title = f"{inline(base['name'])}, edited: {inline(behaviour)}"
    parts = [
        f"---\n{_metadata(receipt)}\n---",
        f"# {title}",
        _description(receipt),
        *_loading(receipt, repository),
        "## What changed",
        table([["", ""], *rows]),
        *_experts(receipt["method"]),
    ]
    parts += [*sections, _receipt(target)]
    return "\n\n".join(parts) + "\n"


def inherited(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a card takes over from the base: its licence, languages, and task."""
    known = base_metadata(checkpoint.path / CARD)
    if "pipeline_tag" not in known:
        tasks = (task for part, task in _TASKS.items() if isinstance(checkpoint.config.get(part), dict))
        known["pipeline_tag"] = next(tasks, "text-generation")
    if checkpoint.config.get("model_type") in TEXT_ALONE:
        known["pipeline_tag"] = "text-generation"
    return known


def base_metadata(card: Path) -> dict[str, Any]:
    """Licence, languages and task from the metadata of a base's own card.

    The licence has its name and link. Empty where the card has none.
    """
    import yaml
    from huggingface_hub import metadata_load

    try:
        read_bytes(card, _CARD_BYTES)
        metadata = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    keys = ("license", "license_name", "license_link", "pipeline_tag")
    facts = {key: metadata[key] for key in keys if _short(metadata.get(key))}
    languages = metadata.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    if languages and all(map(_short, languages)):
        facts["language"] = languages
    return facts


def plan_receipt(plan: EditPlan, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of a plan that was not emitted, in the form of a receipt."""
    from steer2edit import __version__

    return {
        "target": _PLAN,
        "exactness": "the edits themselves, in float32",
        "base": vars(plan.base),
        "plan": {"sha256": plan.hash},
        "method": dict(plan.method),
        "measured": plan.measured.to_json(),
        "data": dict(plan.data),
        "changed": [{"norm": edit.norm} for edit in plan.edits],
        "card": {"pipeline_tag": "text-generation", **metadata},
        "versions": {"steer2edit": __version__},
    }


def method_of(method: Mapping[str, Any]) -> str:
    """A method and its options in words; a merged plan as the number of its parts."""
    parts = method.get("plans")
    if isinstance(parts, list):
        return f"{method.get('name')} of {len(parts)} plans"
    # what was measured of single outputs is in the receipt
    left_out = ("name", "experts", "grade", "errors", "held_out_errors")
    options = pairs({key: value for key, value in method.items() if key not in left_out})
    return f"{method.get('name')}" + (f": {options}" if options else "")


def inline(value: object) -> str:
    """Text from a folder or a data file, in one line, in which nothing is Markdown, HTML or a link."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    text = re.sub(r"[&<>]", lambda match: {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[match[0]], text)
    text = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)
    return text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def _description(receipt: Mapping[str, Any]) -> str:
    if receipt["method"].get("name") == _MASK and _is_model(receipt["target"]):
        return "A checkpoint whose experts were switched by steer2edit, in its weights: no training, no hooks."
    description = _entry(receipt["target"]).description
    if trained(receipt["method"]):
        # every other method computes its edit
        return f"{description.replace('no training, ', '')} Two numbers for each row of its matrices were trained (LinEAS)."
    return description


def trained(method: Mapping[str, Any]) -> bool:
    """Whether a plan, or a part of a composition, comes from a training."""
    parts = method.get("plans") or ()
    return bool(method.get("training")) or any(trained(part["method"]) for part in parts)


def _experts(method: Mapping[str, Any]) -> list[str]:
    """The table of a mask: each expert, what was done to it, and how exactly that is what was wanted."""
    experts = method.get("experts")
    if method.get("name") != _MASK or not isinstance(experts, list):
        return []
    keys = ("layer", "expert", "wish", "how", "grade")
    rows = [[one.get(key, "–") for key in keys] for one in experts[:_LISTED] if isinstance(one, Mapping)]
    rest = [f"and {len(experts) - _LISTED} more in `steer2edit.json`"] if len(experts) > _LISTED else []
    return ["## Experts", table([keys, *rows]), *rest]


def _entry(target: str) -> HubEntry:
    return _PLAN_ENTRY if target == _PLAN else targets.load(target).HUB


def _is_model(target: str) -> bool:
    return target != _PLAN and targets.load(target).WHOLE_MODEL


def _metadata(receipt: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    target, base = receipt["target"], receipt["base"]
    entry = _entry(target)
    taken = dict(receipt.get("card") or {})
    link = taken.get("license_link")
    if link is not None and "://" not in link and not (_is_model(target) and base["revision"] is None):
        # a link inside the base's repository; nothing of it lies here
        taken["license_link"] = _file_of(base, link)
    published = base["revision"] is not None
    data = ModelCardData(
        base_model=base["name"] if published else None,
        base_model_relation=entry.relation if published else None,
        library_name=entry.library,
        tags=["steer2edit", "moe" if receipt["method"].get("name") == _MASK else "activation-steering", *entry.tags],
        **{key: value for key, value in taken.items() if value is not None},
    )
    return str(data.to_yaml())


def _file_of(base: Mapping[str, Any], name: str) -> str | None:
    from huggingface_hub import constants

    if base["revision"] is None:
        return None
    # the card is public: no name or password of an endpoint's user
    endpoint = re.sub(r"://[^/]*@", "://", constants.ENDPOINT)
    return f"{endpoint}/{base['name']}/blob/{base['revision']}/{name.removeprefix('./')}"


def place_of(
    receipt: Mapping[str, Any],
    repository: str | None = None,
    folder: str | None = None,
    base_folder: str | None = None,
) -> Place:
    """Where the artefact of a receipt and its base lie."""
    task = (receipt.get("card") or {}).get("pipeline_tag")
    kind = _AUTO_CLASSES.get(str(task), "AutoModelForCausalLM")
    base = receipt["base"]
    return Place(Base(base["name"], base["revision"], base["fingerprint"]), repository, kind, folder, base_folder)


def snippet_of(
    receipt: Mapping[str, Any],
    repository: str | None = None,
    folder: str | None = None,
    base_folder: str | None = None,
) -> Snippet:
    """How the artefact or plan of a receipt is loaded; see :class:`lowering.target.Place`."""
    place = place_of(receipt, repository, folder, base_folder)
    if receipt["target"] == _PLAN:
        emit = f"steer2edit emit {place.name} {place.base_name} --to lora --out adapter"
        return Snippet("console", ("pip install steer2edit", emit))
    return targets.load(receipt["target"]).load_snippet(place)


def _loading(receipt: Mapping[str, Any], repository: str | None) -> list[str]:
    snippet = snippet_of(receipt, repository)
    prompt = "$ " if snippet.language == "console" else ""
    code = "\n".join(prompt + line for line in snippet.lines)
    return [f"```{snippet.language}\n{code}\n```", *([inline(snippet.remark)] if snippet.remark else [])]


def _receipt(target: str) -> str:
    if target == _PLAN:
        return (
            "`plan.safetensors` holds every edit and the score of every component; `steer2edit show` prints them, "
            "`steer2edit emit` makes a checkpoint or an adapter of them."
        )
    return (
        "`steer2edit.json` is the receipt: every changed tensor, with its hash before and after where it was rewritten. "
        "`steer2edit/plan.safetensors` is the plan that reproduces this artefact from the base; `steer2edit verify` "
        "checks that it does."
    )


def table(rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table of cells in which nothing is markup; the first row is its head."""
    head, *body = [f"| {' | '.join(map(inline, row))} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _short(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
