"""Train a LoRA adapter of rank 1 on contrast pairs: what people would do instead of an edit.

    python benchmarks/train_lora.py MODEL --behavior concise --loss dpo --seconds 60 -o concise-dpo
    steer2edit eval MODEL PLAN concise-dpo --behavior concise

SFT learns the positive responses; DPO (Rafailov et al. 2023) learns to prefer them to the negative ones. Prompts and responses
are tokenized as a compile does it, template and end of turn included. All linear layers get factors, as PEFT finds them; the
learning rate is constant, and training stops after --seconds. It needs pip install 'steer2edit[train]'.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, Steer2EditError
from steer2edit.runtime.model import LoadedModel, Runtime, load_model

Loss = Literal["sft", "dpo"]
LEARNING_RATE, BATCH, RANK = 1e-3, 8, 1


@dataclass(frozen=True)
class Training:
    """What a training did: its loss, steps, passes over the data, and seconds with loading left out."""

    loss: Loss
    steps: int
    epochs: float
    seconds: float


def train(
    loaded: LoadedModel,
    behavior: Behavior,
    loss: Loss,
    seconds: float,
    folder: Path,
    *,
    rank: int = RANK,
    learning_rate: float = LEARNING_RATE,
    batch: int = BATCH,
    steps: int | None = None,
    seed: int = 0,
) -> Training:
    """Write an adapter into ``folder``, trained for ``seconds`` (or ``steps``, where that is less); ``loaded`` stays as it is.

    Raises Steer2EditError without TRL, and DataError where the behaviour has no pairs to learn from.
    """
    try:
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from transformers import TrainerCallback
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    except ImportError as error:
        raise Steer2EditError(f"training needs pip install 'steer2edit[train]' ({error})") from None

    disable_progress_bars()
    examples = behavior.encode(loaded.tokenizer, loaded.context)
    rows = learnt(examples) if loss == "sft" else preferred(examples)
    if not rows:
        raise DataError(f"{behavior.name} holds no {'positive response' if loss == 'sft' else 'pair'} to train on")

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Stops the training when its time is over."""

        started = _now(loaded)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = _now(loaded)

        def on_step_end(self, _args: Any, _state: Any, control: Any, **__: Any) -> None:
            # other callbacks stop it too, at the last step
            control.should_training_stop |= _now(loaded) - self.started >= seconds

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        """DPO on rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    # what TRL precomputes is cached beside the data set: it goes with the folder
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        settings: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": min(batch, len(rows)),
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "max_steps": 1_000_000 if steps is None else steps,
            "max_length": None,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": loaded.device.type == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "seed": seed,
        }
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        made = SFTTrainer if loss == "sft" else Tokenized
        config = SFTConfig(**settings) if loss == "sft" else DPOConfig(**settings)
        model = copy.deepcopy(loaded.model)
        model.requires_grad_(True)
        clock = Clock()
        trainer = made(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=_padded(loaded),
            peft_config=adapter,
            callbacks=[clock],
        )
        trainer.train()
        taken = _now(loaded) - clock.started
        trainer.model.save_pretrained(str(folder))
        state = trainer.state
    epochs = state.global_step * config.per_device_train_batch_size / len(rows)
    return Training(loss, state.global_step, epochs, taken)


def _now(loaded: LoadedModel) -> float:
    """Seconds of each thread's processor time, which other work on the machine does not take; the clock's on a device."""
    if loaded.device.type != "cpu":
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def learnt(examples: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Rows for SFT: a positive response after its prompt, whose tokens alone count."""
    return [
        {"input_ids": list(e.ids), "labels": [-100] * e.start + list(e.ids[e.start :])}
        for e in examples
        if e.label == "positive"
    ]


def preferred(examples: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Rows for DPO: a prompt with its positive and its negative response."""
    sides: dict[int, dict[str, Encoded]] = {}
    for example in examples:
        sides.setdefault(example.row, {})[example.label] = example
    rows = []
    for pair in sides.values():
        if {"positive", "negative"} <= pair.keys():
            good, bad = pair["positive"], pair["negative"]
            start = min(good.start, bad.start)
            rows.append(
                {
                    "prompt_ids": list(good.ids[:start]),
                    "chosen_ids": list(good.ids[start:]),
                    "rejected_ids": list(bad.ids[start:]),
                }
            )
    return rows


def _padded(loaded: LoadedModel) -> Any:
    """The tokenizer with a token for padding: any will do, since padding is masked."""
    tokenizer = copy.copy(loaded.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(loaded.padding)
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Any:
    """What training prints goes to stderr; warnings of the trainers' own code are left out."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", default="concise", help="built-in behaviour, or a file of contrast pairs")
    parser.add_argument("--loss", choices=("sft", "dpo"), default="sft")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="to train for, of each thread's processor time (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, help="stop after so many steps too")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the adapter")
    options = parser.parse_args()
    if not math.isfinite(options.seconds) or options.seconds <= 0:
        parser.error("--seconds: expected a positive number")
    checkpoint = open_checkpoint(options.model)
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
    named = options.behavior
    behavior = (
        Behavior.from_data(named, span="response") if Path(named).is_file() else Behavior.named(named, span="response")
    )
    torch.manual_seed(options.seed)
    done = train(
        loaded, behavior, options.loss, options.seconds, options.out, rank=options.rank,
        learning_rate=options.learning_rate, batch=options.batch, steps=options.steps, seed=options.seed,
    )  # fmt: skip
    print(json.dumps({**asdict(done), "adapter": str(options.out)}))


if __name__ == "__main__":
    main()
