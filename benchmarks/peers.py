"""The same edit with other tools: one direction taken out of every residual writer of a random llama.

    python benchmarks/peers.py --work DIR --size 3.5 --tools /path/to/python

``--tools`` is the interpreter of an environment with the published packages ``ablate-llm`` and ``erisforge`` (torch and
transformers too); what cannot be imported there is left out and named. PEFT's merge takes the adapter that ``emit --to
lora`` made of the same plan. Each tool starts, loads, edits and saves in a process of its own, imports included; then what
it saved is forced to the disk. Peak memory is that process's. What came out is then read back:

- ``not edited, changed``: tensors outside the edit whose bytes differ, or that are missing or stored in another dtype;
- ``edited, off``: entries of edited tensors that are not the exactly computed value rounded once to bf16;
- ``other files``: files of the base whose bytes differ or that are missing.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from synthetic import make_checkpoint
from timing import arguments, drop_from_cache, ratio, report

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.diff.difference import equal
from steer2edit.errors import CheckpointError

_DIRECTION = "r = torch.randn(2048, generator=torch.Generator().manual_seed(7)); r /= r.norm()\n"
_PEAK = """
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""
# the direction's products with each writer are computed first, as a method's plan does
_OURS = """
import torch
torch.set_num_threads({threads})
from steer2edit.scoring.scores import analyse
from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.artefact.emit import emit
{direction}
checkpoint = open_checkpoint({model!r})
spec = read_spec(checkpoint)
edits = [LowRank(s.matrix, -r[:, None], analyse(checkpoint, s, r[None]).projection) for s in spec.sites]
plan = EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), tuple(edits))
emit(plan, checkpoint, spec, {to!r}, {out!r})
"""
_PEFT = """
import torch
torch.set_num_threads({threads})
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()
model.save_pretrained({out!r}, max_shard_size="4GB")
AutoTokenizer.from_pretrained({model!r}).save_pretrained({out!r})
"""
_ABLATE = """
import torch
torch.set_num_threads({threads})
from ablate.model import LM
from ablate.weights import bake_direction
{direction}
lm = LM.load({model!r}, device="cpu", dtype="bfloat16")
bake_direction(lm.model, r, include_embedding=False)
lm.model.save_pretrained({out!r})
lm.tokenizer.save_pretrained({out!r})
"""
_ERISFORGE = """
import torch
torch.set_num_threads({threads})
from erisforge import Forge
from transformers import AutoModelForCausalLM, AutoTokenizer
{direction}
model = AutoModelForCausalLM.from_pretrained({model!r}, torch_dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained({model!r})
Forge().save_model(model, r, min_layer=0, max_layer=len(model.model.layers), output_model_name={out!r},
                   tokenizer=tokenizer, model_architecture="llama")
"""


def run(code: str, python: str, out: Path) -> tuple[float, float]:
    """Seconds from start to everything on the disk, and peak memory in MB. Raises CalledProcessError."""
    start = time.perf_counter()
    done = subprocess.run([python, "-c", code + _PEAK], check=True, capture_output=True, text=True)
    for path in out.rglob("*"):
        subprocess.run(["sync", path], check=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024 / 1e6


def inspect(base: Checkpoint, out: Path, r: torch.Tensor) -> tuple[int, float, list[str]]:
    """What the docstring above names, of one tool's output."""
    edited = {site.tensor for site in read_spec(base).sites}
    made = open_checkpoint(out)
    wrong = off = count = 0
    for name, info in base.tensors.items():
        found = made.tensors.get(name)
        if name not in edited:
            wrong += found is None or not equal(base, made, info, found)
            continue
        old, now = base.read(name).double(), made.read(name)
        exact = (old - torch.outer(r, r @ old)).bfloat16()
        off += int((exact != now).sum()) if now.dtype == torch.bfloat16 else exact.numel()
        count += exact.numel()
    files = [path for path in sorted(base.path.iterdir()) if path.suffix != ".safetensors"]
    other = [p.name for p in files if not (out / p.name).is_file() or (out / p.name).read_bytes() != p.read_bytes()]
    return wrong, off / count, other


def main() -> None:
    parser = arguments(__doc__, model=False, runs=5)
    parser.add_argument("--size", type=float, default=3.5, help="GB of the checkpoint (default %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is read and written")
    parser.add_argument("--tools", help="python of an environment with the other tools")
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted (default %(default)s)")
    given = parser.parse_args()
    model = make_checkpoint(given.work, given.size, 4.0)
    base = open_checkpoint(model)
    out, adapter = given.work / "peers-out", given.work / "peers-adapter"
    filling = {
        "model": str(model), "out": str(out), "adapter": str(adapter), "threads": given.threads,
        "direction": _DIRECTION, "to": "checkpoint",
    }  # fmt: skip
    shutil.rmtree(adapter, ignore_errors=True)
    run(_OURS.format(**{**filling, "to": "lora", "out": str(adapter)}), sys.executable, adapter)
    tools: dict[str, tuple[str, str]] = {
        "steer2edit": (_OURS, sys.executable),
        "PEFT merge_and_unload": (_PEFT, sys.executable),
    }
    if given.tools:
        tools |= {"ablate-llm": (_ABLATE, given.tools), "erisforge": (_ERISFORGE, given.tools)}
    scope: dict[str, torch.Tensor] = {}
    exec(_DIRECTION, {"torch": torch}, scope)
    r = scope["r"].double()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ["cp -r", *tools]}
    quality: dict[str, tuple[int, float, list[str]]] = {}
    failed: dict[str, str] = {}
    for number in range(given.runs + given.warm):
        for name in taken:
            if name in failed:
                continue
            shutil.rmtree(out, ignore_errors=True)
            drop_from_cache([model / shard for shard in base.shards])
            try:
                if name == "cp -r":
                    start = time.perf_counter()
                    subprocess.run(["cp", "-r", model, out], check=True)
                    for path in out.iterdir():
                        subprocess.run(["sync", path], check=True)
                    took = (time.perf_counter() - start, 0.0)
                else:
                    code, python = tools[name]
                    took = run(code.format(**filling), python, out)
                    if name not in quality:
                        quality[name] = inspect(base, out, r)
            except (subprocess.CalledProcessError, CheckpointError) as error:
                told = getattr(error, "stderr", None) or str(error)
                failed[name] = told.strip().splitlines()[-1]
                print(f"{name}: {failed[name]}", file=sys.stderr)
                continue
            if number >= given.warm:
                taken[name].append(took)
            print(f"round {number}: {name} {took[0]:.1f} s, {took[1]:.0f} MB", file=sys.stderr)
    for folder in (out, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    seconds: Mapping[str, list[float]] = {name: [took for took, _ in runs] for name, runs in taken.items() if runs}
    rows: list[list[object]] = []
    for name, runs in seconds.items():
        wrong, off, other = quality.get(name, (0, 0.0, []))
        peak = max(peak for _, peak in taken[name])
        rows.append(
            [name, statistics.median(runs), ratio(runs, seconds["cp -r"]), peak, wrong, f"{off:.3%}", ", ".join(other)]
        )
    headers = ["tool", "seconds", "/ cp -r", "peak MB", "not edited, changed", "edited, off", "other files"]
    report(headers, rows, {"size": given.size, "runs": taken, "failed": failed}, given.json)
    for name, why in failed.items():
        print(f"{name} failed: {why}")


if __name__ == "__main__":
    main()
