"""How far each order is from the best one, as it is and with matched scale.

Every set of layers is measured on calibration text, and each gets its factors. The best order is
the nested family with the lowest mean KL of the sizes between student and teacher.
"""

from collections.abc import Callable
from statistics import mean
from typing import Any

from patching.orders.findings import Sets, matched_scales, tried_orders
from patching.orders.measurements import Measurements
from patching.orders.search import PatchedLayers, all_sets, order_of_sets, search


def regrets(measure: Measurements, orders: tuple[str, ...]) -> dict[str, Any]:
    """Return for `plain` and `matched` the mean KL of each order, in nats per token, and the best
    order. With `matched`, KLPatch also searches by the KL with factors: `klpatch by matched KL`.
    """
    layer_map = measure.family.layer_map
    tried = tried_orders(measure, searches=("klpatch",), exact=True)
    every_set = tuple(all_sets(layer_map))
    scales = matched_scales(measure, {"all": every_set})
    plain = {patched: measure.kl[patched] for patched in every_set}
    matched = {
        patched: scales.sets[patched].kl if scales.factors(patched) else kl
        for patched, kl in plain.items()
    }

    def of(kl: dict[PatchedLayers, float], sets_of_orders: dict[str, Sets]) -> dict[str, Any]:
        best = search(layer_map, always(kl), beam=None)
        return {
            "mean": {name: mean(map(kl.__getitem__, s)) for name, s in sets_of_orders.items()},
            "best_mean": mean(map(kl.__getitem__, best)),
            "best_order": order_of_sets(layer_map, best),
        }

    sets = {order: tried[order] for order in orders}
    with_matched = sets | {"klpatch by matched KL": search(layer_map, always(matched))}
    return {"sets": len(plain), "plain": of(plain, sets), "matched": of(matched, with_matched)}


def always(kl: dict[PatchedLayers, float]) -> Callable[[Any], dict[PatchedLayers, float]]:
    """What a search asks for the KL of sets, if that of all is known."""
    return lambda _: kl
