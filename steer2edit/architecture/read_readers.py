"""From the tensors of a block to its readers: which matrix is which, and the norm whose output each reads.

What is not understood here stops no compile, since methods edit writers: it is listed as undescribed, and edits of it are
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from steer2edit.architecture.family import Family, Mixture, Orientation
from steer2edit.architecture.reader_layouts import DIVIDED, LABELLED, MODULES, NORMS, ROLES, TOGETHER, Norms
from steer2edit.architecture.routers import Router
from steer2edit.architecture.sites import InputNorm, MatrixRole, Reads, Site
from steer2edit.checkpoint import EDITABLE, Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8

_EXPERT_INPUTS = ("gate_proj", "up_proj", "w1", "w3")
# of mixers: kernels of convolutions, and what has a form of its own; gains of a norm for each head
_NO_MATRIX = re.compile(r"(conv|conv1d|conv_1d)$|A_log$|rg_lru\.|[qk]_norm$")


class ReaderFinder:
    """Finds the readers of one checkpoint, block by block; ``model_type`` is the described one, None where none is."""

    def __init__(
        self, checkpoint: Checkpoint, family: Family, model_type: str | None, prefix: str, module: str, hidden: int
    ) -> None:
        self.checkpoint, self.family, self.known = checkpoint, family, model_type is not None
        self.model_type = model_type or ""
        self.prefix, self.module, self.hidden = prefix, module, hidden
        self.norms = NORMS.get(self.model_type, Norms())
        self._by_layer: dict[int, list[str]] = {}
        block = re.compile(re.escape(prefix) + r"(\d+)\.(.+)")
        for name in checkpoint.tensors:
            if match := block.fullmatch(name):
                self._by_layer.setdefault(int(match[1]), []).append(match[2])

    def layer(self, layer: int, writers: Sequence[Site], router: Router | None) -> tuple[list[Site], list[str]]:
        """The readers of a block, the router last but for the experts', and its matrices of which nothing is known."""
        claimed = {site.tensor for site in writers} | set(router.fused if router is not None else ())
        sites, undescribed = [], []
        mixed = any(site.role is MatrixRole.MIXER_OUT for site in writers)
        mixture = self.family.mixture if router is not None else None
        for leaf in self._matrices(layer, claimed, mixture):
            info = self.checkpoint.tensors[f"{self.prefix}{layer}.{leaf}"]
            role = role_of(leaf.removesuffix(".weight"))
            site = None if role is None else self._reader(layer, leaf.removesuffix(".weight"), role, info, mixed)
            if router is not None and info.name == router.tensor:
                continue
            if site is None:
                undescribed.append(info.name)
            else:
                sites.append(site)
        if router is not None and mixture is not None:
            sites.append(self._router(layer, router))
            found, strange = self._experts(layer, router, mixture)
            sites += found
            undescribed += strange
        return sites, undescribed

    def unembedding(self, name: str | None, norm: str | None, last_layer: int) -> Site | None:
        """The unembedding, stored under ``name``; ``norm`` is the tensor of the norm after the last block."""
        info = None if name is None else self.checkpoint.tensors.get(name)
        if info is None or not _is_matrix(info) or info.shape[1] != self.hidden:
            return None
        bias = f"{info.name.removesuffix('.weight')}.bias"
        last = self.norms.offset if self.norms.last_offset is None else self.norms.last_offset
        before = None
        if self.known and self.norms.head and (norm is not None or not self.norms.weights):
            tensor = norm if norm in self.checkpoint.tensors else None
            before = InputNorm("", tensor, last if tensor else 1.0, self._bias_of(tensor))
        return Site(
            role=MatrixRole.UNEMBED,
            layer=last_layer,
            tensor=info.name,
            module="",
            orientation="out_in",
            out_features=info.shape[0],
            in_features=self.hidden,
            bias=bias if bias in self.checkpoint.tensors else None,
            reads=self._reads(before),
            norm_before=before,
        )

    def _matrices(self, layer: int, claimed: set[str], mixture: Mixture | None) -> Iterator[str]:
        """Names inside a block of its matrices that are neither writers nor in routed experts."""
        separate = mixture is not None and mixture.layout == "separate"
        folder = mixture.output.partition("{e}")[0] if mixture is not None and separate else None
        for leaf in self._by_layer.get(layer, ()):
            name = f"{self.prefix}{layer}.{leaf}"
            in_expert = folder is not None and leaf.startswith(folder) and leaf.removeprefix(folder)[:1].isdigit()
            if name in claimed or in_expert or not leaf.endswith(".weight"):
                continue
            if len(self.checkpoint.tensors[name].shape) < 2:
                continue
            if not _NO_MATRIX.search(leaf.removesuffix(".weight")):
                yield leaf

    def _reader(self, layer: int, leaf: str, role: MatrixRole, info: TensorInfo, mixed: bool) -> Site | None:
        before = self._norm_before(layer, role, mixed)
        reads = self._reads(before)
        if role is MatrixRole.MIXER_INSIDE:
            before, reads = None, "inside"
        elif role is MatrixRole.PER_LAYER_GATE:
            before, reads = None, "stream" if self.known else "unknown"
        orientation = self.family.orientation
        if not _is_matrix(info):
            return None
        out, width = info.shape if orientation == "out_in" else info.shape[::-1]
        if width != self.hidden and reads != "inside":
            return None
        path, part = self._path(leaf), None
        if (together := TOGETHER.get(self.model_type, {}).get(role)) is not None:
            path, part = f"{path.rpartition('.')[0]}.{together[0]}", together[1:]
        divided = DIVIDED.get(self.model_type, {}).get(path, ())
        bias = f"{self.prefix}{layer}.{leaf}.bias"
        return Site(
            role=role,
            layer=layer,
            tensor=info.name,
            module=f"{self.module}{layer}.{path}",
            orientation=orientation,
            out_features=out,
            in_features=width,
            bias=bias if bias in self.checkpoint.tensors else None,
            label=self._label(leaf, role),
            reads=reads,
            norm_before=before,
            output_part=part,
            modules=tuple(f"{self.module}{layer}.{one}" for one in divided),
        )

    def _router(self, layer: int, router: Router) -> Site:
        before = self._norm_before(layer, MatrixRole.ROUTER, mixed=True) if self.norms.router else None
        return Site(
            role=MatrixRole.ROUTER,
            layer=layer,
            tensor=router.tensor,
            module=router.router_module,
            orientation="out_in",
            out_features=router.experts,
            in_features=self.hidden,
            bias=router.bias,
            reads=self._reads(before),
            norm_before=before,
        )

    def _experts(self, layer: int, router: Router, mixture: Mixture) -> tuple[list[Site], list[str]]:
        """The input matrices of a block's experts, expert by expert, and those of which nothing is known."""
        base = f"{self.prefix}{layer}."
        before = self._norm_before(layer, MatrixRole.EXPERT_OUT, mixed=True)
        sites, undescribed = [], []
        for expert in range(router.experts):
            for name, role in self._inputs(base, mixture, expert):
                info = self.checkpoint.tensors[name]
                part = None if mixture.layout == "separate" else (expert, router.experts)
                one = info if part is None or info.shape[0] % router.experts else info.part(*part)
                orientation: Orientation = "in_out" if mixture.layout == "in_out" else "out_in"
                fits = role is not None and _is_matrix(one) and one.shape[orientation == "out_in"] == self.hidden
                if role is None or not fits:
                    undescribed.append(name)
                    continue
                bias = f"{name}_bias" if mixture.layout != "separate" else f"{name.removesuffix('.weight')}.bias"
                sites.append(
                    Site(
                        role=role,
                        layer=layer,
                        tensor=name,
                        module=router.experts_module,
                        orientation=orientation,
                        out_features=one.shape[orientation == "in_out"],
                        in_features=self.hidden,
                        bias=bias if bias in self.checkpoint.tensors else None,
                        expert=expert,
                        part=part,
                        reads=self._reads(before),
                        norm_before=before,
                    )
                )
        return sites, sorted(set(undescribed))

    def _inputs(self, base: str, mixture: Mixture, expert: int) -> Iterator[tuple[str, MatrixRole | None]]:
        """Names of an expert's input matrices, or of the tensors that hold those of all experts, each with its role."""
        if mixture.layout == "separate":
            output = mixture.output.format(e=expert)
            for leaf in _EXPERT_INPUTS:
                name = f"{base}{output.rsplit('.', 2)[0]}.{leaf}.weight"
                if name in self.checkpoint.tensors:
                    yield name, role_of(leaf)
            return
        for one in mixture.fused_inputs:
            name = f"{base}{one}"
            if one.endswith(("_bias", "per_expert_scale")) or name not in self.checkpoint.tensors:
                continue
            yield name, role_of(one.removesuffix(".weight"))

    def _norm_before(self, layer: int, role: MatrixRole, mixed: bool) -> InputNorm | None:
        """The norm before a reader; None where it reads the stream itself, or where nothing is known."""
        if not self.known or (self.family.bare_mixers and not mixed):
            return None
        names = self.norms.attention if role.kind is MatrixRole.ATTN_OUT else self.norms.mlp
        if role is MatrixRole.EXPERT_OUT and self.norms.experts is not None:
            names = self.norms.experts
        base = f"{self.prefix}{layer}."
        for name in names:
            module = f"{self.module}{layer}.{self._path(name)}"
            if not self.norms.weights:
                return InputNorm(module, None, 1.0)
            tensor = f"{base}{name}.weight"
            if tensor in self.checkpoint.tensors:
                return InputNorm(module, tensor, self.norms.offset, self._bias_of(tensor))
        return None

    def _bias_of(self, tensor: str | None) -> str | None:
        bias = None if tensor is None else f"{tensor.removesuffix('.weight')}.bias"
        return bias if bias in self.checkpoint.tensors else None

    def _reads(self, before: InputNorm | None) -> Reads:
        if not self.known:
            return "unknown"
        return "stream" if before is None else "norm"

    def _path(self, leaf: str) -> str:
        """The path inside a block of the module that a tensor ``leaf`` belongs to."""
        for theirs, ours in MODULES.get(self.model_type, ()):
            if leaf.startswith(theirs):
                return ours + leaf.removeprefix(theirs)
        return leaf

    def _label(self, leaf: str, role: MatrixRole) -> str:
        if role in LABELLED:
            folder, _, last = leaf.rpartition(".")
            return f"{folder.partition('_layernorm')[0]}_{last}" if "layernorm" in folder else last
        shared = self.family.mixture.shared if self.family.mixture is not None else None
        folder = "" if shared is None else shared.rpartition(".")[0] + "."
        return "shared" if folder and leaf.startswith(folder) and role.kind is MatrixRole.MLP_OUT else ""


def role_of(leaf: str) -> MatrixRole | None:
    """The role of a reader by its name inside its block; None where none is known."""
    parts = leaf.split(".")
    longer = ".".join(parts[-2:])
    return ROLES.get(longer) or ROLES.get(parts[-1])


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and 0 not in info.shape and (info.dtype in EDITABLE or info.dtype == FP8)
