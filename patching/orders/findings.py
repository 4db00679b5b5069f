"""TODO."""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from patching.blocks import as_layer_list
from patching.checkpoints.layout import layout_of
from patching.checkpoints.sizes import size_of
from patching.files.plot import plot_lines
from patching.orders.__main__ import OrdersArguments
from patching.orders.measurements import Measurements
from patching.orders.named_searches import searched_sets
from patching.orders.search import PatchedLayers, all_sets, order_of_sets
from patching.recipe import patched_model


def tried_orders(
    measure: Measurements, arguments: OrdersArguments
) -> dict[str, tuple[PatchedLayers, ...]]:
    """By name the sets of all orders, sizes 1 to max - 1."""
    family, layer_map = measure.family, measure.family.layer_map
    named = {"last": "last", "first": "first"}
    if arguments.requested_order() not in (None, "last", "first"):
        named["given"] = family.order
    sizes = range(1, layer_map.max_layers_to_patch)
    tried = {
        name: tuple(layer_map.patched_layers(k, order) for k in sizes)
        for name, order in named.items()
    }
    student = frozenset()
    measure({student, *(patched for sets in tried.values() for patched in sets)})
    for name in ("block-influence", "klpatch"):
        tried[name] = searched_sets(name, measure)
    if arguments.beam > 1:
        name = f"beam {arguments.beam}"
        tried[name] = searched_sets(name, measure, arguments.beam)
    if arguments.exact:
        measure(all_sets(layer_map))
        tried["exact"] = searched_sets("exact", measure, None)
    return tried


def findings(
    measure: Measurements,
    tried: Mapping[str, tuple[PatchedLayers, ...]],
    is_exact: bool,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What order.json holds of the orders: sizes with their KL, areas, regrets.

    `mean_kl` is the mean over the sizes between student and teacher, which a search makes small;
    `area` the mean along the axis of parameters from student to teacher. Regret is how much higher
    the mean is than that of the best nested family, and than that of the best set of each size,
    nested or not.
    """
    family, layer_map = measure.family, measure.family.layer_map
    everything = frozenset(range(len(layer_map.kept)))
    layouts = {
        parent: layout_of(config, torch.float32, trust_remote_code)
        for parent, config in family.configs.items()
    }

    def member(k: int, patched: PatchedLayers) -> dict[str, Any]:
        size = size_of(patched_model(layer_map, patched), layouts, torch.float32, sys.maxsize)
        return {
            "num_layers_to_patch": k,
            "patched_layers": sorted(patched),
            "layers": size.depth,
            "parameters": size.parameters._asdict(),
            "kl": 0.0 if patched == everything else measure.kl[patched],
        }

    def mean(sets: Sequence[PatchedLayers]) -> float:
        return sum(measure.kl[patched] for patched in sets) / len(sets)

    found: dict[str, Any] = {"orders": {}}
    best_sets: list[PatchedLayers] = []
    if is_exact:
        by_size: dict[int, list[PatchedLayers]] = {}
        for patched in all_sets(layer_map):
            by_size.setdefault(layer_map.num_patched(patched), []).append(patched)
        best_sets = [min(by_size[k], key=lambda s: (measure.kl[s], sorted(s))) for k in by_size]
        found["best_sets"] = [member(k, patched) for k, patched in enumerate(best_sets, start=1)]
        found["num_sets"] = sum(map(len, by_size.values()))
    for name, sets in tried.items():
        members = [member(k, patched) for k, patched in enumerate([frozenset(), *sets, everything])]
        result = {
            "order": order_of_sets(layer_map, sets),
            "mean_kl": mean(sets),
            "area": _area(members),
            "members": members,
        }
        if is_exact:
            result["regret"] = mean(sets) - mean(tried["exact"])
            result["regret_of_best_sets"] = mean(sets) - mean(best_sets)
        found["orders"][name] = result
    return found


def _area(members: Sequence[Mapping[str, Any]]) -> float:
    points = [(member["parameters"]["both_counted"], member["kl"]) for member in members]
    total = sum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(points))
    return total / (points[-1][0] - points[0][0])


def table(found: Mapping[str, Any]) -> str:
    """The orders as Markdown: KL of each size, means, regrets."""
    sizes = len(next(iter(found["orders"].values()))["members"])
    is_exact = "best_sets" in found
    header = ["order", "layers", *(f"k = {k}" for k in range(sizes)), "mean", "area"]
    header += ["regret", "regret to best sets"] if is_exact else []
    rows = []
    for name, result in found["orders"].items():
        cells = [name, as_layer_list(result["order"])]
        numbers = [member["kl"] for member in result["members"]]
        numbers += [result["mean_kl"], result["area"]]
        numbers += [result["regret"], result["regret_of_best_sets"]] if is_exact else []
        rows.append([*cells, *(f"{number:.4f}" for number in numbers)])
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kl_figure(found: Mapping[str, Any]):
    """KL against parameters, a line for each order."""
    lines = {
        name: [(m["parameters"]["both_counted"] / 1e6, m["kl"]) for m in result["members"]]
        for name, result in found["orders"].items()
    }
    return plot_lines(lines, "parameters (millions)", "KL(teacher || model), nats per token")
