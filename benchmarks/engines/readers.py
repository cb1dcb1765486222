"""Does llama.cpp's converter change a checkpoint's readers as a GGUF adapter of ours says?

    python benchmarks/engines/readers.py make WORK [TYPE …]            where steer2edit is installed
    venv-llamacpp/bin/python benchmarks/engines/readers.py compare WORK

``make`` builds a tiny random model of each type in ``READERS``, a random rank-1 edit of each reader that an adapter carries, and
writes the edited checkpoint and the adapter. ``compare`` converts base and edited checkpoint in float32, and prints the largest
entry in which their difference and the adapter's ``B A`` differ. The converter's difference has an entry of about 0.1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))


def make(work: Path, types: list[str]) -> None:
    from conftest import save_tiny
    from family_configs import INSIDE, family_config
    from mixture_models import MIXTURE_TYPES, mixture_config, save_mixture
    from reader_laws import single_readers

    from steer2edit.architecture import read_spec
    from steer2edit.artefact.emit import emit
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.errors import Steer2EditError
    from steer2edit.plan import Base, EditPlan
    from steer2edit.targets.gguf import READERS

    for name in types or [name for name in READERS if name not in INSIDE]:
        folder = work / name / "base"
        if name in MIXTURE_TYPES and name != "gemma4_text":
            save_mixture(folder, mixture_config(name))
        else:
            save_tiny(folder, family_config(name))
        checkpoint = open_checkpoint(folder)
        spec = read_spec(checkpoint)
        edits = [edit for edit in single_readers(checkpoint, spec) if "kv_b_proj" not in edit.tensor]
        plan = EditPlan(Base.of(checkpoint), tuple(edits))
        try:
            emit(plan, checkpoint, spec, "checkpoint", work / name / "edited")
            emit(plan, checkpoint, spec, "gguf", work / name / "adapter")
        except Steer2EditError as error:
            print(name, error, file=sys.stderr)


def compare(work: Path) -> None:
    import convert

    sources = convert._sources()
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    for folder in sorted(path.parent for path in work.glob("*/adapter")):
        try:
            for kind in ("base", "edited"):
                out = str(folder / f"{kind}.gguf")
                convert.convert("ids", str(folder / kind), "--outfile", out, "--outtype", "f32")
            base, edited = (_tensors(folder / f"{kind}.gguf") for kind in ("base", "edited"))
            adapter = _tensors(folder / "adapter" / "adapter.gguf")
            changed = {name for name, value in base.items() if value.shape == edited[name].shape}
            changed = {name for name in changed if abs(edited[name] - base[name]).max() > 1e-6}
            carried = {name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")}
            worst = max(
                abs(edited[name] - base[name] - adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]).max()
                for name in carried
            )
            missing = "" if changed == carried else f", other tensors: {sorted(changed ^ carried)[:3]}"
            print(f"| {folder.name} | {len(carried)} | {worst:.0e}{missing} |", flush=True)
        except Exception as error:  # of whatever the converter cannot do with a tiny model
            print(f"| {folder.name} | – | {type(error).__name__}: {str(error).splitlines()[-1][:80]} |", flush=True)


def _tensors(path: Path) -> dict[str, Any]:
    import gguf
    import numpy

    return {one.name: numpy.array(one.data, dtype=numpy.float64) for one in gguf.GGUFReader(path).tensors}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["make", "compare"])
    parser.add_argument("work", type=Path)
    parser.add_argument("types", nargs="*")
    given = parser.parse_args()
    make(given.work, given.types) if given.step == "make" else compare(given.work)
