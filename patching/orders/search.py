"""Search for the best family: nested sets of patched layers, from student to teacher.

A set of size k has k patchable layers. Single-layer blocks do not change the size, so measurement
decides about them too: a set may also contain any of those that a run of patched layers connects to
a patchable one, and each choice is a separate candidate.

    cost of a family = sum of the KL of its members between student and teacher

The search goes up size by size and keeps the `beam` cheapest families. With a beam of one this is
KLPatch (arXiv 2607.08170), which takes the set with the lowest KL at each size. Without a bound it
is a shortest path over all sets, where an edge costs the KL of the model it reaches. That
formulation is ours, and its answer is the best nested family.

This file is integers and one function that measures. It does not import torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from patching.blocks import LayerMap

MOST_SETS = 2**15
"""Largest number of sets that may be measured."""

PatchedLayers = frozenset[int]
Measure = Callable[[Collection[PatchedLayers]], Mapping[PatchedLayers, float]]
"""Returns a mapping with at least the KL of each given set's model from the teacher."""


class BeamState(NamedTuple):
    """The cheapest family found so far that ends with the last of its sets."""

    cost: float
    sets: tuple[PatchedLayers, ...]
    """The sets of sizes 1, 2, ... Every family also has the student and the teacher."""

    @property
    def patched(self) -> PatchedLayers:
        return self.sets[-1] if self.sets else frozenset()

    @property
    def rank(self) -> tuple:
        """Sort key: the cost, then the layers, so that ties always break the same way."""
        return self.cost, [sorted(patched) for patched in self.sets]


def search(
    layer_map: LayerMap,
    measure: Measure,
    beam: int | None = 1,
    sequence: Sequence[int] | None = None,
    report: Callable[[int, PatchedLayers, float], None] = lambda *_: None,
) -> tuple[PatchedLayers, ...]:
    """Return the sets of sizes 1 to max - 1 of the cheapest family found.

    `beam` None keeps all families. A `sequence` fixes the order of the patchable layers, so that
    only single-layer blocks are searched. `report` is called at each size with k, the last set of
    the cheapest family so far, and its KL.
    """
    families = [BeamState(0.0, ())]
    for k in range(1, layer_map.max_layers_to_patch):
        candidates = layer_map.patchable if sequence is None else sequence[k - 1 : k]
        steps = [
            (family, bigger)
            for family in families
            for bigger in next_sets(layer_map, family.patched, candidates)
        ]
        kl = measure({bigger for _, bigger in steps})
        reached: dict[PatchedLayers, BeamState] = {}
        for family, bigger in steps:
            longer = BeamState(family.cost + kl[bigger], (*family.sets, bigger))
            if bigger not in reached or longer.rank < reached[bigger].rank:
                reached[bigger] = longer
        families = sorted(reached.values(), key=lambda family: family.rank)[:beam]
        report(k, families[0].patched, kl[families[0].patched])
    return families[0].sets


def next_sets(
    layer_map: LayerMap, patched: PatchedLayers, candidates: Collection[int]
) -> set[PatchedLayers]:
    """Return the sets that contain this one and are one size larger, by one of `candidates`."""
    found: set[PatchedLayers] = set()
    growing = [patched | {layer} for layer in candidates if layer not in patched]
    while growing:
        bigger = growing.pop()
        if bigger not in found:
            found.add(bigger)
            growing += [bigger | {single} for single in _joined_singles(layer_map, bigger)]
    return found


def _joined_singles(layer_map: LayerMap, patched: PatchedLayers) -> list[int]:
    """Return the unpatched single-layer blocks next to a patched layer."""
    return [
        i
        for i, block in enumerate(layer_map.blocks)
        if len(block) == 1 and i not in patched and patched & {i - 1, i + 1}
    ]


def all_sets(layer_map: LayerMap) -> list[PatchedLayers]:
    """Return every set between student and teacher, by size.

    Raises ValueError if there are too many to measure.
    """
    found = list(islice(_sets_by_size(layer_map), MOST_SETS + 1))
    if len(found) > MOST_SETS:
        raise ValueError(
            f"this student has more than {MOST_SETS:,} sets of patchable layers and single-layer "
            "blocks next to them: leave out --exact and widen --beam instead"
        )
    return found


def _sets_by_size(layer_map: LayerMap) -> Iterator[PatchedLayers]:
    of_size: list[PatchedLayers] = [frozenset()]
    for _ in range(1, layer_map.max_layers_to_patch):
        bigger: dict[PatchedLayers, None] = {}
        for patched in of_size:
            for found in next_sets(layer_map, patched, layer_map.patchable):
                if found not in bigger:
                    bigger[found] = None
                    yield found
        of_size = list(bigger)


def order_of_sets(layer_map: LayerMap, sets: Sequence[PatchedLayers]) -> tuple[int, ...]:
    """Return the explicit order whose sizes are these nested sets of sizes 1 to max - 1.

    The single-layer blocks that a set adds come before its patchable layer.
    """
    order: list[int] = []
    for patched in (*sets, frozenset(range(len(layer_map.kept)))):
        step = patched - set(order)
        order += sorted(step, key=lambda i: (i in layer_map.patchable, i))
    return tuple(order)
