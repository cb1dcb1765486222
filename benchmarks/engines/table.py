"""The matrix as a Markdown table, from what the engines left in a work folder.

    python benchmarks/engines/table.py WORK [CASE …]

A cell is the largest difference of a log-probability from transformers', over the five most likely tokens of every greedy step;
where not all greedy tokens are the same, it says how many are. "ignored" means that an adapter was loaded and changed nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import arguments, cases

# column: engine, what it is, and the cells of which it shows the worst
COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("transformers", "effect of the edit", ("effect",)),
    ("transformers", "merged", ("merged against base + hooks",)),
    ("peft", "adapter", ("load",)),
    ("peft", "merged", ("merge",)),
    ("peft", "unmerged", ("unmerge",)),
    ("peft", "swapped, and back", ("hot-swap", "back again")),
    ("peft", "two with weights", ("composed", "composed adapter")),
    ("vllm", "base", ("base",)),
    ("vllm", "merged", ("merged",)),
    ("vllm", "adapters", ("first", "second", "both")),
    ("vllm", "base and two in a batch", ("mixed batch",)),
    ("llamacpp", "base", ("base",)),
    ("llamacpp", "merged", ("merged",)),
    ("llamacpp", "adapters", ("first", "second")),
    ("llamacpp", "two with weights", ("both",)),
    ("llamacpp", "control vector", ("control vector",)),
    ("mlx", "base", ("base",)),
    ("mlx", "merged", ("merged",)),
    ("mlx", "adapters", ("first", "second")),
    ("mlx", "two with weights", ("both",)),
    ("mlx", "with experts", ("experts",)),
    ("mlx", "adapter over 4 bits", ("quantised",)),
)
# of multimodal models: the adapter as it is written, and under the other names that its tensors could have
WRAPPER_COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("transformers", "effect of the edit", ("effect",)),
    ("vllm", "base", ("base",)),
    ("vllm", "adapters", ("first", "second", "both")),
    ("vllm", "base and two in a batch", ("mixed batch",)),
    ("vllm", "as `language_model.model`", ("as language_model.model",)),
    ("vllm", "as `model`", ("as model",)),
)
# of mixtures: an adapter that edits every expert too, beside the same one with experts' factors of zero
EXPERT_COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("peft", "adapter with experts", ("experts",)),
    ("peft", "what the experts' factors do", ("experts, against base",)),
    ("llamacpp", "base", ("base",)),
    ("llamacpp", "adapter with experts", ("experts",)),
    ("llamacpp", "what the experts' factors do", ("experts, against base",)),
)
NAMES = {"transformers": "transformers", "peft": "PEFT", "vllm": "vLLM", "llamacpp": "llama.cpp", "mlx": "mlx-lm"}


def main(work: Path, chosen: Sequence[str]) -> None:
    notes: list[str] = []
    versions: dict[str, str] = {}
    for title, engines, table, multimodal in (
        ("transformers and PEFT", ("transformers", "peft"), COLUMNS, None),
        ("vLLM", ("vllm",), COLUMNS, False),
        ("vLLM: multimodal models", ("transformers", "vllm"), WRAPPER_COLUMNS, True),
        ("PEFT: experts in adapters", ("peft",), EXPERT_COLUMNS, None),
        ("llama.cpp", ("llamacpp",), COLUMNS, None),
        ("llama.cpp: experts in adapters", ("llamacpp",), EXPERT_COLUMNS, None),
        ("mlx-lm", ("mlx",), COLUMNS, None),
    ):
        columns = [column for column in table if column[0] in engines]
        rows = []
        for case in sorted(cases(work), key=lambda case: (case["name"].startswith("tiny"), case["name"])):
            if chosen and case["key"] not in chosen:
                continue
            if multimodal not in (None, bool(case.get("multimodal"))):
                continue
            results = work / "results" / engines[-1] / f"{case['key']}.json"
            if not results.is_file():
                continue
            if table is EXPERT_COLUMNS and "experts" not in json.loads(results.read_text())["cells"]:
                continue
            row = [case["name"]]
            for engine, _, wanted in columns:
                held = json.loads((work / "results" / engine / f"{case['key']}.json").read_text())
                versions |= held["versions"]
                one = held["cells"]
                ignored = any(
                    _is_ignored(one[name], one.get(f"{name}, against base")) for name in wanted if name in one
                )
                row.append(
                    "**ignored**" if ignored else _cell([one.get(name, {"error": "not run"}) for name in wanted], notes)
                )
            rows.append(row)
        heads = ["model", *(what if len(engines) == 1 else f"{NAMES[engine]}: {what}" for engine, what, _ in columns)]
        print(f"### {title}\n\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version) + ".\n")
    print("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))


def _is_ignored(edited: dict[str, Any], base: dict[str, Any] | None) -> bool:
    """Whether the answers are the unedited model's: at least a hundred times nearer to it than to the edited one."""
    return base is not None and "largest" in base and 100 * base["largest"] < edited.get("largest", 0)


def _cell(found: Sequence[dict[str, Any]], notes: list[str]) -> str:
    """The worst of several comparisons, or the number of the note that says why there is none."""
    errors = [one["error"] for one in found if "error" in one]
    if errors:
        if errors[0] not in notes:
            notes.append(errors[0])
        return f"– [{notes.index(errors[0]) + 1}]"
    equal, total = (sum(one[key] for one in found) for key in ("equal", "total"))
    largest = max(one["largest"] for one in found)
    tokens = "" if equal == total else f" ({equal}/{total} tokens)"
    return f"{largest:.0e}{tokens}" if largest else f"0{tokens}"


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    main(given.work, given.cases)
