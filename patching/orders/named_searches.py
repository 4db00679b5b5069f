"""TODO."""

import sys
from collections.abc import Sequence

from patching.blocks import LayerMap, as_layer_list
from patching.orders.measurements import Measurements
from patching.orders.search import PatchedLayers, order_of_sets, search


def most_restored_first(layer_map: LayerMap, influences: Sequence[float]) -> list[int]:
    """Patchable layers by the summed influence of the teacher layers that patching puts back."""
    return sorted(
        layer_map.patchable,
        key=lambda i: (-sum(influences[layer] for layer in layer_map.blocks[i][1:]), i),
    )


def searched_sets(
    name: str, measure: Measurements, beam: int | None = 1
) -> tuple[PatchedLayers, ...]:
    """The sets of a searched order, sizes 1 to max - 1."""
    layer_map = measure.family.layer_map
    sequence = None
    if name == "block-influence":
        sequence = most_restored_first(layer_map, measure.influences)

    def report(k: int, patched: PatchedLayers, kl: float) -> None:
        layers = as_layer_list(sorted(patched))
        print(f"{name}, k = {k}: patched {layers}, KL {kl:.4f}", file=sys.stderr, flush=True)

    return search(layer_map, measure, beam, sequence, report)


def searched_order(measure: Measurements) -> tuple[int, ...]:
    """The order that the pair's own flags ask to search."""
    sets = searched_sets(measure.family.arguments.order, measure)
    return order_of_sets(measure.family.layer_map, sets)
