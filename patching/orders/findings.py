"""What is found about the orders of a family: the KL of every size along each order, and how far
each order is from the best one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from patching.blocks import LayerMap, Order, as_layer_list
from patching.files.plot import plot_lines
from patching.orders.measurements import Measurements
from patching.orders.search import PatchedLayers, all_sets, order_of_sets, search
from patching.recipe import patched_model

Sets = tuple[PatchedLayers, ...]
"""The sets of patched layers along an order, for sizes 1 to max - 1."""
Report = Callable[[str, int, PatchedLayers, float], None]
"""Called with a search's name, k, the set it chose and its KL."""


def searched_order(
    measure: Measurements, name: str, report: Report = lambda *_: None
) -> tuple[int, ...]:
    """The order that a search finds: `klpatch` or `block_influence`."""
    return order_of_sets(measure.family.layer_map, searched_sets(measure, name, report=report))


def searched_sets(
    measure: Measurements, name: str, beam: int | None = 1, report: Report = lambda *_: None
) -> Sets:
    """The sets that a search finds. With `block_influence` the sequence of patchable layers is
    fixed in advance, and only the single-layer blocks are searched. `beam` None is no bound.
    """
    layer_map, sequence = measure.family.layer_map, None
    if name == "block_influence":
        sequence = most_restored_first(layer_map, measure.influences)
    return search(layer_map, measure, beam, sequence, lambda *step: report(name, *step))


def most_restored_first(layer_map: LayerMap, influences: Sequence[float]) -> list[int]:
    """Patchable layers, sorted by the summed influence of the teacher layers that patching
    restores, largest first.
    """
    return sorted(
        layer_map.patchable,
        key=lambda i: (-sum(influences[layer] for layer in layer_map.blocks[i][1:]), i),
    )


def tried_orders(
    measure: Measurements,
    given: Order | None = None,
    beam: int = 1,
    exact: bool = False,
    report: Report = lambda *_: None,
) -> dict[str, Sets]:
    """The sets of every order tried, by its name: `last`, `first`, `given`, both searches, a wider
    beam, and with `exact` the best nested family of all.
    """
    layer_map = measure.family.layer_map
    named: dict[str, Order] = {"last": "last", "first": "first"}
    if given is not None:
        named["given"] = given
    sizes = range(1, layer_map.max_layers_to_patch)
    tried = {
        name: tuple(layer_map.patched_layers(k, order) for k in sizes)
        for name, order in named.items()
    }
    student = frozenset()
    measure({student, *(patched for sets in tried.values() for patched in sets)})
    for name in ("block_influence", "klpatch"):
        tried[name] = searched_sets(measure, name, report=report)
    if beam > 1:
        tried[f"beam {beam}"] = searched_sets(measure, f"beam {beam}", beam, report)
    if exact:
        measure(all_sets(layer_map))
        tried["exact"] = searched_sets(measure, "exact", None, report)
    return tried


def findings(measure: Measurements, tried: Mapping[str, Sets]) -> dict[str, Any]:
    """What order.json holds about the orders: their sizes with KL, areas, and regrets if every set
    was measured (the order `exact`).

    `mean_kl` is the mean over the sizes between student and teacher, which a search minimizes, and
    `area` is the mean along the parameter axis from student to teacher. `regret` is how much higher
    the mean is than that of the best nested family, and `regret_of_best_sets` than that of the best
    set of each size, nested or not.
    """
    layer_map = measure.family.layer_map
    teacher = frozenset(range(len(layer_map.kept)))
    found: dict[str, Any] = {"orders": {}}
    best_sets: list[PatchedLayers] = []
    if "exact" in tried:
        by_size: dict[int, list[PatchedLayers]] = {}
        for patched in all_sets(layer_map):
            by_size.setdefault(layer_map.num_patched(patched), []).append(patched)
        best_sets = [min(by_size[k], key=lambda s: (measure.kl[s], sorted(s))) for k in by_size]
        found["best_sets"] = [
            _member(measure, k, patched) for k, patched in enumerate(best_sets, start=1)
        ]
        found["num_sets"] = sum(map(len, by_size.values()))
    for name, sets in tried.items():
        members = [
            _member(measure, k, patched) for k, patched in enumerate([frozenset(), *sets, teacher])
        ]
        result = {
            "order": order_of_sets(layer_map, sets),
            "mean_kl": measure.mean_kl(sets),
            "area": _area(members),
            "members": members,
        }
        if best_sets:
            result["regret"] = result["mean_kl"] - measure.mean_kl(tried["exact"])
            result["regret_of_best_sets"] = result["mean_kl"] - measure.mean_kl(best_sets)
        found["orders"][name] = result
    return found


def _member(measure: Measurements, k: int, patched: PatchedLayers) -> dict[str, Any]:
    family = measure.family
    size = family.size(patched_model(family.layer_map, patched))
    is_teacher = len(patched) == len(family.layer_map.kept)
    return {
        "num_layers_to_patch": k,
        "patched_layers": sorted(patched),
        "layers": size.depth,
        "parameters": size.parameters._asdict(),
        "kl": 0.0 if is_teacher else measure.kl[patched],
    }


def _area(members: Sequence[Mapping[str, Any]]) -> float:
    points = [(member["parameters"]["both_counted"], member["kl"]) for member in members]
    total = sum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(points))
    return total / (points[-1][0] - points[0][0])


def table(found: Mapping[str, Any]) -> str:
    """The orders as a Markdown table: KL of each size, means, and regrets if they are known."""
    sizes = len(next(iter(found["orders"].values()))["members"])
    header = ["order", "layers", *(f"k = {k}" for k in range(sizes)), "mean", "area"]
    keys = ["mean_kl", "area"]
    if "best_sets" in found:
        header += ["regret", "regret to best sets"]
        keys += ["regret", "regret_of_best_sets"]
    rows = []
    for name, result in found["orders"].items():
        numbers = [member["kl"] for member in result["members"]] + [result[key] for key in keys]
        cells = (f"{number:.4f}" for number in numbers)
        rows.append([name, as_layer_list(result["order"]), *cells])
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kl_figure(found: Mapping[str, Any]):
    """KL against parameters, with a line for each order."""
    lines = {
        name: [
            (m["parameters"]["both_counted"] / 1e6, m["kl"])
            for m in result["members"]
            if math.isfinite(m["kl"])
        ]
        for name, result in found["orders"].items()
    }
    return plot_lines(lines, "parameters (millions)", "KL(teacher || model), nats per token")
