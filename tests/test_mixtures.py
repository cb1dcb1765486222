"""Every family of mixtures, on a tiny random model: writers and routers are all found, and are all there is."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CONTEXTS
from mixture_models import EXPERTS, MIXTURE_TYPES, MODELS, TOP_K, Case, experts_down, writing_parameters
from reader_laws import check_readers, reader_plan
from safetensors.torch import load_file, save_file

from steer2edit import methods
from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import TOLERANCE
from steer2edit.artefact.verify import verify
from steer2edit.capture.populations import routing_key
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.errors import ArchitectureError, TargetError
from steer2edit.plan import Assign, Base, Edit, EditPlan, LowRank, Scale, Structure
from steer2edit.runtime.expert_modules import experts_module
from steer2edit.runtime.hooks import edited
from steer2edit.scoring.scores import Scoring

ROUTER = MatrixRole.ROUTER


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    root = tmp_path_factory.mktemp("mixtures")
    return functools.cache(lambda name: Case(MODELS[name](root / name)))


@pytest.fixture(params=MIXTURE_TYPES)
def case(request: pytest.FixtureRequest, build: Callable[[str], Case]) -> Case:
    return build(request.param)


def test_the_experts_of_a_spec_are_the_modules_of_transformers(case: Case) -> None:
    loaded, spec = case.loaded(), case.spec
    assert spec.routers and all((router.experts, router.top_k) == (EXPERTS, TOP_K) for router in spec.routers)
    counted = Counter(site.layer for site in spec.sites if site.role is MatrixRole.EXPERT_OUT)
    assert counted == {router.layer: EXPERTS for router in spec.routers}
    for site in spec.sites:
        W = case.matrix(site)
        assert W.shape == (site.out_features, site.in_features)
        held = experts_down(loaded, site) if site.expert is not None else loaded.module(site).weight
        assert torch.equal(held, W)
    for router in spec.routers:
        module = loaded.model.get_submodule(router.router_module)
        weight = next(p for p in module.parameters() if p.shape == (EXPERTS, spec.hidden_size))
        assert torch.equal(weight, case.checkpoint.read(router.tensor))
    names = [name for site in spec.sites for name in (site.matrix, site.bias_vector) if name]
    assert len(set(names)) == len(names) and all(spec.owners[name].matrix or name for name in names)


def test_without_its_writers_a_mixture_knows_no_context(case: Case) -> None:
    loaded = case.loaded()

    def last() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = loaded.model(input_ids=CONTEXTS, use_cache=False).logits[:, -1]
            return logits

    before = last()
    assert (before[0] - before[1]).abs().max() > 1e-3
    ours = {id(p): p for site in case.spec.sites for p in writing_parameters(loaded.module(site))}
    for parameter in ours.values():
        parameter.zero_()
    silent = last()
    assert torch.equal(silent[0], silent[1])
    blocks = [loaded.model.get_submodule(f"{case.spec.block_modules}{i}") for i in range(case.spec.layers)]
    others = [p for block in blocks for p in block.parameters() if p.ndim >= 2 and id(p) not in ours]
    for parameter in others:
        parameter.normal_()
    assert torch.equal(last(), silent)


def test_readers_are_all_that_reads_the_stream(case: Case) -> None:
    check_readers(case.checkpoint, case.loaded())


def rewritten(source: Path, folder: Path, drop: str | None = None, **config: Any) -> Path:
    """A copy of a checkpoint without one tensor, or with other config values."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, folder / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def random_plan(case: Case, size: float = 0.3, readers: bool = False) -> EditPlan:
    """A rank-1 edit of every writer, of ``size`` times its output, and a gain, a row and a bias where there are such.

    With ``readers`` also an edit of every reader but the routers.
    """
    generator = torch.Generator().manual_seed(0)

    def direction(n: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0)

    silenced = [site for site in case.spec.sites if site.expert == 3]
    edits: list[Edit] = [
        LowRank(site.matrix, direction(site.out_features)[:, None], size * direction(site.in_features)[None])
        for site in case.spec.sites
        if site not in silenced
    ]
    for site in silenced:
        edits += [Scale.whole(name, 0.5) for name in (site.matrix, site.bias_vector) if name]
    if readers:
        owners = case.spec.owners
        edits += [e for e in reader_plan(case.checkpoint, case.spec).edits if owners[e.tensor].role is not ROUTER]
    for router in case.spec.routers:
        edits.append(Assign(router.tensor, (2, 5), torch.stack([direction(case.spec.hidden_size) for _ in range(2)])))
        if router.bias:
            edits.append(Assign(router.bias, (1,), torch.tensor([0.25])))
    return EditPlan(Base(case.checkpoint.name, None, case.checkpoint.fingerprint), tuple(edits))


def test_a_plan_becomes_a_checkpoint_that_is_the_model_under_hooks(case: Case, tmp_path: Path) -> None:
    plan = random_plan(case, readers=True)
    plan.save(tmp_path / "x.plan.safetensors")
    assert EditPlan.load(tmp_path / "x.plan.safetensors").hash == plan.hash
    lowering = emit(plan, case.checkpoint, case.spec, "checkpoint", tmp_path / "out")
    assert [change.tensor for change in lowering.changes]
    assert {change.tensor for change in lowering.changes} == {edit.tensor for edit in plan.edits}
    result = verify(tmp_path / "out", base=case.folder)
    assert result.ok, result.problems
    # the plan is large: what its rounding to the stored float32 explains is not the compiler's
    assert result.numbers["difference"] - result.numbers["rounding"] <= TOLERANCE < result.numbers["effect"]


@pytest.mark.parametrize("model_type", ["glm4_moe", "gpt_oss", "mixtral"])
def test_a_router_that_was_set_is_set_back(build: Callable[[str], Case], model_type: str) -> None:
    loaded = build(model_type).loaded()
    router = loaded.spec.routers[0]
    before = loaded.model(CONTEXTS).logits
    row = Assign(router.tensor, (2, 5), torch.ones(2, loaded.spec.hidden_size))
    bias = [] if router.bias is None else [Assign(router.bias, (1,), torch.tensor([-1e4]))]
    with edited(loaded, EditPlan(Base("tiny", None, ""), (row, *bias))):
        assert not torch.equal(loaded.model(CONTEXTS).logits, before)
    assert torch.equal(loaded.model(CONTEXTS).logits, before)


def test_edits_of_experts_and_routers_are_refused_as_an_adapter(build: Callable[[str], Case], tmp_path: Path) -> None:
    case = build("mellum")
    with pytest.raises(TargetError) as caught:
        emit(random_plan(case), case.checkpoint, case.spec, "lora", tmp_path / "out")
    told = str(caught.value)
    assert "experts.0.down_proj.weight" in told and "--to checkpoint" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_peft_applies_an_adapter_with_experts_and_dense_writers(
    build: Callable[[str], Case], tmp_path: Path, model_type: str
) -> None:
    case = build(model_type)
    others = (MatrixRole.EMBED, MatrixRole.ROUTER)
    plan = random_plan(case)
    low = [e for e in plan.edits if isinstance(e, LowRank) and case.spec.owners[e.tensor].role not in others]
    # ranks 2 and 1 by turns, so that an expert's rows and columns cannot be taken for another's
    wide = [LowRank(e.tensor, torch.cat([e.B, e.B.flip(0)], 1), torch.cat([e.A, e.A.flip(1)])) for e in low[::2]]
    emit(replace(plan, edits=(*wide, *low[1::2])), case.checkpoint, case.spec, "lora", tmp_path / "out")
    result = verify(tmp_path / "out", base=case.folder)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]


def test_peft_applies_an_adapter_of_experts_alone(build: Callable[[str], Case], tmp_path: Path) -> None:
    case = build("mixtral")
    plan = random_plan(case)
    experts = tuple(e for e in plan.edits if isinstance(e, LowRank) and case.spec.owners[e.tensor].expert is not None)
    emit(replace(plan, edits=experts), case.checkpoint, case.spec, "lora", tmp_path / "out")
    result = verify(tmp_path / "out", base=case.folder)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]


def test_peft_applies_an_adapter_of_dense_and_shared_writers_beside_experts(
    build: Callable[[str], Case], tmp_path: Path
) -> None:
    """A target called down_proj is the experts' to PEFT, which would leave these out without a word."""
    case = build("ernie4_5_moe")
    plan = random_plan(case)
    roles = (MatrixRole.MLP_OUT, MatrixRole.SHARED_EXPERT_OUT)
    edits = tuple(edit for edit in plan.edits if case.spec.owners[edit.tensor].role in roles)
    assert len(edits) == 3
    emit(replace(plan, edits=edits), case.checkpoint, case.spec, "lora", tmp_path / "out")
    result = verify(tmp_path / "out", base=case.folder)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= TOLERANCE < result.numbers["effect"]


def refusal(folder: Path) -> str:
    with pytest.raises(ArchitectureError) as caught:
        read_spec(open_checkpoint(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("leaf", "told"),
    [("experts.3.w2.weight", "is missing (expert 3 of 8)"), ("gate.weight", "is missing")],
)
def test_a_missing_expert_or_router_stops_the_compile(
    build: Callable[[str], Case], tmp_path: Path, leaf: str, told: str
) -> None:
    name = f"model.layers.1.block_sparse_moe.{leaf}"
    assert f"{name} {told}" in refusal(rewritten(build("mixtral").folder, tmp_path / "out", drop=name))


def test_a_count_that_does_not_fit_the_router_stops_the_compile(build: Callable[[str], Case], tmp_path: Path) -> None:
    folder = rewritten(build("mixtral").folder, tmp_path / "out", num_local_experts=7)
    assert "expected 7 rows" in refusal(folder)


def test_an_unknown_mixture_is_refused_with_the_place_to_describe_it(
    build: Callable[[str], Case], tmp_path: Path
) -> None:
    message = refusal(rewritten(build("qwen3_moe").folder, tmp_path / "out", model_type="unheard_of"))
    assert "is a mixture of experts" in message and "steer2edit/architecture/mixtures.py" in message


def captured(case: Case, statistics_of: Callable[..., Any]) -> Any:
    if case.statistics is None:
        case.statistics = statistics_of(case.folder)
    return case.statistics


def test_a_capture_of_experts_is_what_their_matrices_are_given(case: Case, statistics_of: Callable[..., Any]) -> None:
    """The weighted inputs, put through the experts' matrices, add up to the mean of what the layer's experts wrote."""
    statistics = captured(case, statistics_of)
    for router in case.spec.routers:
        for label in LABELS:
            moments = statistics.experts[router.layer, label]
            total = torch.zeros(case.spec.hidden_size, dtype=torch.float64)
            for site in (s for s in case.spec.sites if s.expert is not None and s.layer == router.layer):
                total += case.matrix(site).double() @ moments.weighted[site.expert]
                if site.bias_vector:
                    bias = case.checkpoint.read(site.locate(case.checkpoint, site.bias_vector)).double()
                    total += (
                        bias
                        * statistics.mean(routing_key("mass", "response", router.layer), "output", label)[site.expert]
                    )
            expected = statistics.mean(f"experts_out.{router.layer}", "output", label)
            assert torch.allclose(total, expected, atol=1e-5 * float(expected.abs().max() + 1))
            selected = statistics.mean(routing_key("selected", "response", router.layer), "output", label)
            assert float(selected.sum()) == pytest.approx(TOP_K, abs=1e-6)
            counts = statistics.mean(routing_key("counts", "response", router.layer), "output", label)
            assert float(moments.tokens.sum()) == pytest.approx(TOP_K * statistics.tokens[label])
            assert torch.allclose(counts[:-1] * statistics.examples[label], moments.tokens)


@pytest.mark.parametrize("method", ["component", "steering"])
def test_methods_edit_inside_experts(case: Case, statistics_of: Callable[..., Any], method: str) -> None:
    module = methods.load(method)
    scoring = Scoring(case.checkpoint, case.spec, captured(case, statistics_of))
    given = {"top_neurons": 0.2, "stable": False} if method == "component" else {"sites": "mlp", "stable": False}
    plan = module.plan(scoring, module.Options(**given, min_tokens=8))
    assert MatrixRole.EXPERT_OUT in {case.spec.owners[edit.tensor].role for edit in plan.edits}
    tokens = {s.key: scoring.statistics.routed_tokens(s.key) for s in case.spec.sites if s.expert is not None}
    left = sum(count < 8 for count in tokens.values())
    assert plan.method["experts_left_alone"] == left
    few = {s.matrix for s in case.spec.sites if s.expert is not None and tokens[s.key] < 8}
    assert not few & {edit.tensor for edit in plan.edits}


REMOVED = (1, 4)


def cut_plan(case: Case, removed: tuple[int, ...] = REMOVED, edits: tuple[Edit, ...] = ()) -> EditPlan:
    structure = Structure({router.layer: removed for router in case.spec.routers})
    base = Base(case.checkpoint.name, None, case.checkpoint.fingerprint)
    return EditPlan(base, edits, structure=structure)


def test_a_model_without_experts_is_the_model_whose_router_cannot_see_them(case: Case, tmp_path: Path) -> None:
    kept = next(s for s in case.spec.sites if s.expert == 2)
    edit = LowRank(kept.matrix, torch.ones(kept.out_features, 1), 0.1 * torch.ones(1, kept.in_features))
    plan = cut_plan(case, edits=(edit,))
    plan.save(tmp_path / "x.plan.safetensors")
    assert EditPlan.load(tmp_path / "x.plan.safetensors").hash == plan.hash
    emit(plan, case.checkpoint, case.spec, "checkpoint", tmp_path / "out")
    result = verify(tmp_path / "out", base=case.folder)
    assert result.ok, result.problems
    assert result.numbers["difference"] <= 3e-5 < result.numbers["effect"]
    spec = read_spec(open_checkpoint(tmp_path / "out"))
    assert {router.experts for router in spec.routers} == {EXPERTS - len(REMOVED)}


def test_experts_in_a_form_that_is_not_known_are_refused(build: Callable[[str], Case]) -> None:
    case = build("qwen3_moe")
    loaded = case.loaded()
    router = case.spec.routers[0]
    experts_module(loaded.model, router)
    parent, _, name = router.experts_module.rpartition(".")
    setattr(loaded.model.get_submodule(parent), name, torch.nn.Linear(2, 2))
    with pytest.raises(ArchitectureError, match=r"not known \(Linear\); a newer release may run them"):
        experts_module(loaded.model, router)
