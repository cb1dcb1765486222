r"""Silence heads, neurons or whole layers, named in a list or chosen by their scores.

A component reads the columns c of its writer's matrix. Silencing multiplies these columns by 0, which is exact:

    W'_c = 0

``--leave mean`` also puts what the component writes on average into the writer's bias, so that only what varies is lost:

    b' = b + W_c x_bar_c

This is zero and mean ablation, as in circuit analysis. Listed components need no statistics and no behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from steer2edit.errors import PlanError, listing
from steer2edit.methods._shared import ALL_COMPONENTS, LAYERS
from steer2edit.options import option, options_of
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.plan import Edit, EditPlan, Scores, Structure
    from steer2edit.scoring.scores import Scoring

MIN_TOKENS = 32
"""Tokens of contrast data that an expert needs for its neurons to be ranked."""


@dataclass(frozen=True)
class Options:
    """Which components are silenced, and whether their mean stays."""

    strength: ClassVar[float] = 1.0
    """Silenced is silenced: no KL budget decides how much."""

    components: str | None = option(
        None, "Silence these: names such as attn.3.h2,mlp.5.n17-40,layer.7, or a file of names.", metavar="NAMES"
    )
    strongest: int | None = option(
        None,
        "Silence this many components, those of the largest |score|.",
        minimum=1,
        shown_default="1 without --components",
    )
    scores_from: str | None = option(None, "Plan whose scores --strongest takes.", "--scores-from", metavar="PLAN")
    kind: Literal["heads", "neurons", "both"] = option("heads", "Components among which --strongest chooses.")
    side: Literal["either", "toward", "against"] = option(
        "either", "Components that --strongest takes: those that write toward the behaviour, against it, or either."
    )
    leave: Literal["nothing", "mean"] = option(
        "nothing", "What is left of a component: nothing, or the mean of what it writes, in its writer's bias."
    )
    prune: bool = option(
        False,
        "Remove layers that are named as a whole from the model, in place of silencing them; for whole checkpoints only.",
    )
    mean_of: Literal["contrast", "background", "chat"] = option(
        "contrast", "Texts over which that mean is taken.", rare=True
    )
    stable: bool = option(True, ALL_COMPONENTS, "--all-components", value=False)
    layers: tuple[int, int] | None = option(None, LAYERS)

    @property
    def without_statistics(self) -> bool:
        """Whether nothing that was captured is needed."""
        return self.leave == "nothing" and (self.components is not None or self.scores_from is not None)


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """Factors of 0 for the columns of each silenced component.

    Raises PlanError where no component is chosen, or a mean has no bias to be in; ArchitectureError for names that are not there.
    """
    from steer2edit.architecture.components import component_names, read_components
    from steer2edit.methods._biases import no_bias
    from steer2edit.plan import Base, EditPlan

    if options.components is not None and options.strongest is not None:
        raise PlanError("--components and --strongest are both given; give one of them")
    _check_used(options)
    spec = scoring.spec
    tables: Mapping[str, Scores] = {}
    if options.components is not None:
        chosen = read_components(_names(options.components), spec)
    else:
        tables = _tables(scoring, options, progress)
        chosen = _strongest(tables, options)
    sites = [spec.site(key) for key in chosen]
    if not sites:
        raise PlanError("no component is chosen to be silenced")
    problems = [why for site in sites if (why := no_bias(spec, site))]
    if options.leave == "mean" and problems:
        raise PlanError(f"the mean that is left would be a bias:\n{listing(problems)}\nUse --leave nothing.")
    if options.prune:
        return _pruned(scoring, options, chosen)
    edits: list[Edit] = []
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            edits += _silenced(scoring, site, chosen[site.key], options)
            if site.key in tables:
                tables = {**tables, site.key: _removed(scoring, site, tables[site.key], chosen[site.key])}
            advance(1)
    names = [name for site in sites for name in component_names(site, chosen[site.key])]
    method = {"name": "silence", **asdict(options), "silenced": names}
    return EditPlan(Base.of(scoring.checkpoint), tuple(edits), tables, method)


def _check_used(options: Options) -> None:
    """Raise PlanError for options that would change nothing beside the others."""
    default = Options()
    ranking = ("scores_from", "kind", "side", "layers") if options.components is not None else ()
    unused = [(name, "--components lists what is silenced: it goes with --strongest") for name in ranking]
    unused += [("mean_of", "it goes with --leave mean")] if options.leave == "nothing" else []
    flags = {one.name: one.flags[-1] for one in options_of(Options)}
    for name, why in unused:
        if getattr(options, name) != getattr(default, name):
            raise PlanError(f"{flags[name]} would change nothing: {why}")


def _pruned(scoring: Scoring, options: Options, chosen: Mapping[str, tuple[int, ...]]) -> EditPlan:
    """A plan that removes layers. Raises PlanError where less than a whole layer is chosen, or the model cannot lose one."""
    from steer2edit.architecture.removal import layer_problems
    from steer2edit.plan import Base, EditPlan, Structure

    spec = scoring.spec
    layers = tuple(sorted({spec.site(key).layer for key in chosen}))
    kept = [s.key for s in spec.sites if s.layer in layers and len(chosen.get(s.key, ())) < s.components]
    if kept or options.leave != "nothing":
        why = f"something of {kept[0]} is left" if kept else "--leave mean leaves something of them"
        raise PlanError(f"--prune removes whole layers, and {why}: name layers as a whole, such as layer.5")
    if problems := layer_problems(layers, scoring.checkpoint, spec):
        raise PlanError(f"layers cannot be removed from this model:\n{listing(problems)}")
    method = {"name": "silence", **asdict(options), "removed_layers": list(layers)}
    return EditPlan(Base.of(scoring.checkpoint), (), {}, method, structure=Structure(layers=layers))


def structure(spec: ModelSpec, options: Options) -> Structure:
    """The layers that a plan with these options removes: those of the listed components."""
    from steer2edit.architecture.components import read_components
    from steer2edit.plan import Structure

    chosen = read_components(_names(options.components), spec) if options.prune and options.components else {}
    return Structure(layers=tuple(sorted({spec.site(key).layer for key in chosen})))


def widest(spec: ModelSpec, options: Options) -> Sequence[Edit]:
    """The scales of listed components; without a list, of as many columns of every matrix as the strongest have."""
    import torch

    from steer2edit.architecture.components import read_components
    from steer2edit.plan import Scale

    if options.prune:
        return []
    if options.components is not None:
        chosen = read_components(_names(options.components), spec)
        sites = {site: numbers for site in spec.sites if (numbers := chosen.get(site.key))}
        return [Scale(site.matrix, (~_columns(site, numbers)).double(), "columns") for site, numbers in sites.items()]
    edits = []
    for site in _sites(spec, options):
        factors = torch.ones(site.in_features, dtype=torch.float64)
        factors[: (options.strongest or 1) * (site.in_features // site.components)] = 0
        edits.append(Scale(site.matrix, factors, "columns"))
    return edits


def _names(text: str) -> list[str]:
    """Names between commas or spaces; where the text is a file's name, those of its lines, without comments after ``#``."""
    path = Path(text).expanduser()
    if path.is_file():
        text = "\n".join(line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
    return text.replace(",", " ").split()


def _tables(scoring: Scoring, options: Options, progress: Progress) -> dict[str, Scores]:
    """The scores among which the strongest are, by site, with no strength."""
    import torch

    from steer2edit.plan import EditPlan

    spec = scoring.spec
    sites = _sites(spec, options)
    if options.scores_from is None:
        sites, _ = scoring.routed_enough(sites, MIN_TOKENS)
        return {one.site.key: one.table for one in scoring.score(sites, progress)}
    source = EditPlan.load(options.scores_from)
    source.check_base(scoring.checkpoint)
    found = {site.key: source.scores[site.key] for site in sites if site.key in source.scores}
    if wrong := [key for key, table in found.items() if len(table.g) != spec.site(key).components]:
        raise PlanError(f"{options.scores_from} has other numbers of components than the model at {listing(wrong)}")
    if not found:
        raise PlanError(
            f"{options.scores_from} holds no scores of {options.kind if options.kind != 'both' else 'heads or neurons'} in "
            "these layers; the methods component and steering record them"
        )
    return {key: replace(table, lam=torch.zeros_like(table.g)) for key, table in found.items()}


def _sites(spec: ModelSpec, options: Options) -> list[Site]:
    """The matrices among whose components the strongest are."""
    from steer2edit.architecture import MatrixRole

    first, last = spec.layer_range(options.layers)
    wanted = {"heads": (True,), "neurons": (False,), "both": (True, False)}[options.kind]
    roles = (MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT)
    return [
        site
        for site in spec.sites
        if first <= site.layer <= last and site.role.kind in roles and (site.heads is not None) in wanted
    ]


def _strongest(tables: Mapping[str, Scores], options: Options) -> dict[str, tuple[int, ...]]:
    import torch

    count = options.strongest or 1
    sizes = []
    for table in tables.values():
        eligible = table.stable if options.stable else torch.ones_like(table.stable)
        if options.side != "either":
            eligible = eligible & (table.g > 0 if options.side == "toward" else table.g < 0)
        sizes.append(torch.where(eligible, table.g.abs(), torch.zeros_like(table.g)))
    together = torch.cat(sizes)
    there = int((together > 0).sum())
    if there < count:
        raise PlanError(
            f"--strongest {count}: only {there} {options.kind if options.kind != 'both' else 'components'} qualify; "
            "give a smaller number, or --all-components"
        )
    mask = torch.zeros_like(together, dtype=torch.bool)
    mask[together.topk(count).indices] = True
    chosen = {}
    for key, part in zip(tables, torch.split(mask, [len(size) for size in sizes]), strict=True):
        if bool(part.any()):
            chosen[key] = tuple(part.nonzero()[:, 0].tolist())
    return chosen


def _silenced(scoring: Scoring, site: Site, numbers: tuple[int, ...], options: Options) -> list[Edit]:
    import torch

    from steer2edit.methods._biases import bias_edit
    from steer2edit.plan import Scale

    if len(numbers) == site.components and site.bias_vector is not None and options.leave == "nothing":
        # all of a writer: its bias goes too
        zeros = torch.zeros(site.out_features, dtype=torch.float64)
        return [Scale(name, zeros.clone(), "rows") for name in (site.matrix, site.bias_vector)]
    gone = _columns(site, numbers)
    scale = Scale(site.matrix, (~gone).double(), "columns")
    if options.leave == "nothing":
        return [scale]
    from steer2edit.scoring.scores import written

    statistics = scoring.statistics
    x = (
        statistics.x_bar(site.key)
        if options.mean_of == "contrast"
        else statistics.mean(site.key, "input", options.mean_of)
    )
    return [scale, bias_edit(site, written(scoring.checkpoint, site, x.float() * gone))]


def _columns(site: Site, numbers: tuple[int, ...]) -> torch.Tensor:
    """The input columns of components, [in] bool."""
    import torch

    gone = torch.zeros(site.components, dtype=torch.bool)
    gone[list(numbers)] = True
    return gone.repeat_interleave(site.in_features // site.components)


def _removed(scoring: Scoring, site: Site, table: Scores, numbers: tuple[int, ...]) -> Scores:
    """The table with the size of what is taken from each silenced component as its edit, against it: -‖W_c‖."""
    import torch

    from steer2edit.scoring.scores import analyse

    norms = analyse(scoring.checkpoint, site, torch.zeros(1, site.out_features)).norms[0]
    by_component = norms.view(site.components, -1).norm(dim=1)
    lam = torch.zeros_like(table.g)
    lam[list(numbers)] = -by_component[list(numbers)]
    return replace(table, lam=lam)
