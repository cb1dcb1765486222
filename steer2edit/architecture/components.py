"""Names of components, as lists and reports write them: ``attn.3.h2``, ``mlp.5.n17``, ``expert.4.7.n3``.

``attn.3.h2`` is head 2 of layer 3's attention, ``mlp.5.n17`` is neuron 17 of layer 5's MLP, and ``expert.4.7.n3`` is neuron 3 of
expert 7 in layer 4. ``shared.4.n3`` is a neuron of the shared expert, and ``mixer.2.c9`` is channel 9 of what stands in
attention's place. A range is ``mlp.5.n17-40``. Without a component's number it is all of them: ``mlp.5``, or ``layer.5`` for
everything that the layer writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from steer2edit.architecture.sites import MatrixRole, ModelSpec, Site
from steer2edit.errors import ArchitectureError, listing, shown

SHORT: Mapping[str, str] = {
    MatrixRole.ATTN_OUT.value: "attn",
    MatrixRole.MIXER_OUT.value: "mixer",
    MatrixRole.MLP_OUT.value: "mlp",
    MatrixRole.SHARED_EXPERT_OUT.value: "shared",
    MatrixRole.EXPERT_OUT.value: "expert",
    MatrixRole.PER_LAYER_OUT.value: "per_layer",
}
"""How a component's name begins, by the role of its matrix."""
_LETTERS = {"h": "heads", "n": "neurons", "c": "channels"}
_NAME = re.compile(r"([a-z_]{1,20})\.(\d{1,5})(?:\.(\d{1,5}))?(?:\.([hnc])(\d{1,7})(?:-(\d{1,7}))?)?", re.ASCII)


def letter(role: str) -> str:
    """``h`` for heads, ``c`` for a mixer's channels, ``n`` for neurons."""
    return {MatrixRole.ATTN_OUT.value: "h", MatrixRole.MIXER_OUT.value: "c"}.get(role, "n")


def site_name(key: str) -> str:
    """The name of all components of a site, from its key: ``attn.3`` for ``attn_out.3``."""
    role, _, rest = key.partition(".")
    return f"{SHORT.get(role, role)}.{rest}"


def component_name(key: str, index: int) -> str:
    """The name of one component of a site, from the site's key."""
    return f"{site_name(key)}.{letter(key.partition('.')[0])}{index}"


def component_names(site: Site, numbers: Sequence[int]) -> list[str]:
    """Names of several of a site's components, in order.

    All of them are named as the site, and runs as a range.
    """
    if len(numbers) == site.components:
        return [site_name(site.key)]
    names: list[str] = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        inside = [number for _, number in run]
        last = f"-{inside[-1]}" if len(inside) > 1 else ""
        names.append(component_name(site.key, inside[0]) + last)
    return names


def read_components(names: Iterable[str], spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The numbers of the components that ``names`` list, in order, by their site's key.

    Raises ArchitectureError, with every problem, for names of components that the model does not have.
    """
    chosen: dict[str, set[int]] = {}
    problems = []
    for name in names:
        sites, numbers, problem = _read(name, spec)
        if problem:
            problems.append(f"{shown(name)}: {problem}")
        for site in sites:
            chosen.setdefault(site.key, set()).update(range(site.components) if numbers is None else numbers)
    if problems:
        raise ArchitectureError(f"these are not components of the model:\n{listing(problems)}")
    return {site.key: tuple(sorted(chosen[site.key])) for site in spec.sites if site.key in chosen}


def _read(name: str, spec: ModelSpec) -> tuple[list[Site], range | None, str]:
    """The sites of a name, the numbers of components (None for all), and what is wrong."""
    match = _NAME.fullmatch(name)
    if match is None:
        return [], None, "expected a name such as attn.3.h2, mlp.5.n17, expert.4.7.n3, mlp.5 or layer.5"
    kind, layer, expert, letter_, first, last = match.groups()
    if kind == "layer":
        sites = [site for site in spec.sites if site.layer == int(layer)]
        if expert or letter_:
            return [], None, "a layer is named as a whole, such as layer.5"
    else:
        role = next((role for role, short in SHORT.items() if short == kind), None)
        if role is None:
            return [], None, f"{kind} is none of {', '.join([*SHORT.values(), 'layer'])}"
        sites = [site for site in spec.sites if site.key == ".".join(filter(None, (role, layer, expert)))]
        if not sites and expert is None and role == MatrixRole.EXPERT_OUT.value:
            return [], None, "an expert is named with its number, such as expert.4.7"
    if not sites:
        return (
            [],
            None,
            f"the model has no {name.rpartition('.')[0] if letter_ else name}; its layers are 0-{spec.layers - 1}",
        )
    if letter_ is None:
        return sites, None, ""
    site = sites[0]
    own = "h" if site.heads is not None else letter(site.role.value)
    if site.heads is None and own == "h":
        own = "n"
    if letter_ != own:
        return (
            [],
            None,
            f"its components are {_LETTERS[own]}, written {site_name(site.key)}.{own}0, not {_LETTERS[letter_]}",
        )
    low, high = int(first), int(last or first)
    if not low <= high < site.components:
        return [], None, f"it has the {_LETTERS[own]} 0-{site.components - 1}"
    return sites, range(low, high + 1), ""
