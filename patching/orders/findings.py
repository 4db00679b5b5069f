"""What is found about the orders of a family: the KL of every size along each order, and how far
each order is from the best one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from patching.blocks import LayerMap, Order, as_layer_list
from patching.files.outputs import environment, finite_or_none
from patching.files.plot import plot_lines
from patching.matched_scale import MatchedScales
from patching.orders.measurements import Measurements
from patching.orders.scales import BudgetSpent, search_scales
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
    searches: Sequence[str] = ("block_influence", "klpatch"),
) -> dict[str, Sets]:
    """The sets of every order tried, by its name: `last`, `first`, `given`, the `searches`, a wider
    beam, and with `exact` the best nested family of all.

    A search that would take more than the budget is left out. Raises BudgetSpent if there is not
    even enough for the named orders.
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
    for name in searches:
        with suppress(BudgetSpent):
            tried[name] = searched_sets(measure, name, report=report)
    if beam > 1:
        tried[f"beam {beam}"] = searched_sets(measure, f"beam {beam}", beam, report)
    if exact:
        measure(all_sets(layer_map))
        tried["exact"] = searched_sets(measure, "exact", None, report)
    return tried


def matched_scales(measure: Measurements, tried: Mapping[str, Sets]) -> MatchedScales:
    """The factors of every set along the orders tried, those of the best order first."""
    layer_map, found = measure.family.layer_map, {}
    for name in sorted(tried, key=lambda name: measure.mean_kl(tried[name])):
        sets = [patched for patched in tried[name] if patched not in found]
        tokens = measure.tokens_of_rows
        for scale in search_scales(layer_map, sets, measure.ratios, measure.of_rows, tokens):
            found[scale.patched_layers] = scale
    names = ("text", "text_sha256", "dtype")
    found_on = {name: measure.settings[name] for name in names}
    found_on |= {"documents": len(measure.tokens_of_rows), "tokens": sum(measure.tokens_of_rows)}
    return MatchedScales(found, found_on)


def findings(
    measure: Measurements, tried: Mapping[str, Sets], scales: MatchedScales | None = None
) -> dict[str, Any]:
    """What order.json holds about the orders: their sizes with KL, areas, and regrets if every set
    was measured (the order `exact`).

    `scales` adds to each member its factors and `kl_matched`, and to each order the mean of these.
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
            _member(measure, k, patched, scales)
            for k, patched in enumerate([frozenset(), *sets, teacher])
        ]
        result = {
            "order": order_of_sets(layer_map, sets),
            "mean_kl": measure.mean_kl(sets),
            "area": _area(members),
            "members": members,
        }
        if scales is not None:
            between = [member["kl_matched"] for member in members[1:-1]]
            result["mean_kl_matched"] = sum(between) / len(between)
        if best_sets:
            result["regret"] = result["mean_kl"] - measure.mean_kl(tried["exact"])
            result["regret_of_best_sets"] = result["mean_kl"] - measure.mean_kl(best_sets)
        found["orders"][name] = result
    return found


def best_order(found: Mapping[str, Any]) -> str:
    """The name of the order with the lowest mean KL, with matched scale where it was measured."""
    orders = found["orders"]

    def mean(name: str) -> float:
        return orders[name].get("mean_kl_matched", orders[name]["mean_kl"])

    return min(orders, key=mean)


def best_order_text(found: Mapping[str, Any]) -> str:
    """The best order and its mean KL, for users."""
    best = best_order(found)
    result = found["orders"][best]
    matched = result.get("mean_kl_matched")
    text = f"{best}, mean KL {result['mean_kl']:.4f}"
    return text if matched is None else f"{text}, with matched scale {matched:.4f}"


def order_file(
    measure: Measurements,
    found: Mapping[str, Any],
    scales: MatchedScales | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """What order.json holds: the best order, and how it was found."""
    best = best_order(found)
    return {
        "order": found["orders"][best]["order"],
        "name": best,
        **({} if scales is None else {"scales": scales.to_dict()}),
        **finite_or_none(found),
        "settings": measure.settings,
        "arguments": arguments,
        "environment": environment(),
    }


def _member(
    measure: Measurements, k: int, patched: PatchedLayers, scales: MatchedScales | None = None
) -> dict[str, Any]:
    family = measure.family
    size = family.size(patched_model(family.layer_map, patched))
    is_teacher = len(patched) == len(family.layer_map.kept)
    kl = 0.0 if is_teacher else measure.kl[patched]
    matched = {}
    if scales is not None:
        factors = scales.factors(patched)
        matched["factors"] = {str(run): factor for run, factor in factors.items()}
        matched["kl_matched"] = scales.sets[patched].kl if factors else kl
    return {
        "num_layers_to_patch": k,
        "patched_layers": sorted(patched),
        "layers": size.depth,
        "parameters": size.parameters._asdict(),
        "kl": kl,
        **matched,
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
        if "mean_kl_matched" in result:
            numbers = [member["kl_matched"] for member in result["members"]]
            cells = (f"{number:.4f}" for number in (*numbers, result["mean_kl_matched"]))
            rows.append([f"{name}, scaled", "", *cells, *[""] * (len(keys) - 1)])
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kl_figure(found: Mapping[str, Any]):
    """KL against parameters, with a line for each order, of rescaled sizes where there are any."""
    lines = {
        name: [
            (m["parameters"]["both_counted"] / 1e6, m.get("kl_matched", m["kl"]))
            for m in result["members"]
            if math.isfinite(m["kl"])
        ]
        for name, result in found["orders"].items()
    }
    return plot_lines(lines, "parameters (millions)", "KL(teacher || model), nats per token")
