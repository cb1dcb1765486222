"""A model on which operators are tried: on disk as the compiler reads it, captured, and loaded for hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from steer2edit import targets
from steer2edit.architecture import ModelSpec, Site, read_spec
from steer2edit.artefact.emit import emit
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.tokens import Span
from steer2edit.lowering import AppliedPlan, PeftAdapter, StreamShift, WholeModel, resolve
from steer2edit.plan import EditPlan
from steer2edit.runtime.adapters import adapted
from steer2edit.runtime.hooks import edited, stream_shifted
from steer2edit.runtime.model import LoadedModel, Runtime, load_model, load_weights


@dataclass
class Subject:
    """A model in float32, captured on a ``behavior``; ``contexts`` [rows, tokens] are what logits are compared on."""

    family: str
    loaded: LoadedModel
    checkpoint: Checkpoint
    behavior: Behavior
    contexts: torch.Tensor
    gradients: dict[Span, Vectors] = field(default_factory=dict)
    _captured: dict[Span, Statistics] = field(default_factory=dict)

    @classmethod
    def of(cls, family: str, folder: Path, behavior: Behavior, contexts: torch.Tensor) -> Subject:
        checkpoint = open_checkpoint(folder)
        loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="float32"))
        return cls(family, loaded, checkpoint, behavior, contexts)

    def captured(self, span: Span = "matched") -> Statistics:
        """The behaviour's statistics, with prose as the background, read once for each span."""
        if span not in self._captured:
            behavior = replace(self.behavior, span=span)
            self._captured[span] = capture_statistics(self.loaded, self.checkpoint, behavior, chat=())
        return self._captured[span]

    @property
    def statistics(self) -> Statistics:
        return self.captured()

    @property
    def spec(self) -> ModelSpec:
        return self.loaded.spec

    def matrix(self, site: Site) -> torch.Tensor:
        """A site's W [out, in], float64, with which ``y = W x``."""
        stored = self.checkpoint.read(site.locate(self.checkpoint)).double()
        return stored if site.orientation == "out_in" else stored.T

    @cached_property
    def base(self) -> torch.Tensor:
        """The base's logits on the contexts."""
        return self.logits()

    def logits(self, model: Any = None) -> torch.Tensor:
        """Logits on the contexts, of every position, float64."""
        with torch.inference_mode():
            found = (model or self.loaded.model)(input_ids=self.contexts, use_cache=False).logits
            return torch.as_tensor(found).double()

    def hooked(self, hooks: Mapping[str, Any]) -> torch.Tensor:
        """Logits of the base under hooks by module."""
        with _hooked(self.loaded.model, hooks):
            return self.logits()

    def artefact(self, plan: EditPlan, target: str, folder: Path) -> torch.Tensor:
        """Logits of the artefact that ``target`` makes of a plan, loaded as its users load it. Raises TargetError."""
        emit(plan, self.checkpoint, self.spec, target, folder)
        loadable = targets.load(target).loadable(resolve(plan, self.checkpoint, self.spec), folder)
        if isinstance(loadable, WholeModel):
            return replace(self, loaded=replace(self.loaded, model=load_weights(loadable.folder))).logits()
        with ExitStack() as stack:
            if isinstance(loadable, AppliedPlan):
                stack.enter_context(edited(self.loaded, loadable.plan))
            elif isinstance(loadable, StreamShift):
                stack.enter_context(stream_shifted(self.loaded, loadable.vectors))
            else:
                assert isinstance(loadable, PeftAdapter)
                stack.enter_context(adapted(self.loaded.model, loadable.folder))
            return self.logits()


@contextmanager
def _hooked(model: Any, hooks: Mapping[str, Any]) -> Iterator[None]:
    """Within the block each named module's output is what its hook gives of input and output, reckoned in float64."""

    def hook_of(change: Any) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            # an embedding reads token ids
            wide = x.double() if x.is_floating_point() else x
            changed = change(wide, y.double()).to(y.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with ExitStack() as stack:
        for name, change in hooks.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(hook_of(change), with_kwargs=True).remove)
        yield
