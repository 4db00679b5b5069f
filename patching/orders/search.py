"""Families searched by measurement: nested sets of patched layers from student to teacher.

A set of size k holds k patchable layers. Single-layer blocks change no size, so they are decided by
the same measure as the rest: of those that a run of patched layers joins to a patchable one, a set
may hold any, and each choice is a candidate of its own.

    cost of a family = sum of the KL of its members between student and teacher

A search walks up size by size and goes on with the `beam` cheapest families so far. With a beam of
one this is KLPatch (arXiv 2607.08170): at each size the set with the lowest KL. Without a bound it
is a shortest path over all sets, where an edge costs the KL of the model it reaches; this
formulation is ours, and its answer is the best nested family.

Everything here is integers and one function that measures; no torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from patching.blocks import LayerMap

MOST_PATCHABLE = 12
"""Patchable layers up to which every set is measured."""
MOST_SETS = 2**15

PatchedLayers = frozenset[int]
Measure = Callable[[Collection[PatchedLayers]], Mapping[PatchedLayers, float]]
"""Gives (at least) the KL of each set's model from the teacher."""


class BeamState(NamedTuple):
    """The cheapest way found so far to the last of its sets."""

    cost: float
    sets: tuple[PatchedLayers, ...]
    """Sizes 1, 2, ...; student and teacher, which every family has, left out."""

    @property
    def patched(self) -> PatchedLayers:
        return self.sets[-1] if self.sets else frozenset()

    @property
    def rank(self) -> tuple:
        """Sorts families by cost; where costs are equal, so that the result is always the same."""
        return self.cost, [sorted(patched) for patched in self.sets]


def search(
    layer_map: LayerMap,
    measure: Measure,
    beam: int | None = 1,
    sequence: Sequence[int] | None = None,
    report: Callable[[int, PatchedLayers, float], None] = lambda *_: None,
) -> tuple[PatchedLayers, ...]:
    """The sets of sizes 1 to max - 1 of the cheapest family found.

    `beam` None is no bound. With a `sequence` of the patchable layers only single-layer blocks are
    left to decide. `report` hears of each size, the last set of the cheapest family so far and its
    KL.
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
    """The sets one size larger that hold this one, by one of those patchable layers."""
    found: set[PatchedLayers] = set()
    growing = [patched | {layer} for layer in candidates if layer not in patched]
    while growing:
        bigger = growing.pop()
        if bigger not in found:
            found.add(bigger)
            growing += [bigger | {single} for single in _joined_singles(layer_map, bigger)]
    return found


def _joined_singles(layer_map: LayerMap, patched: PatchedLayers) -> list[int]:
    """Single-layer blocks next to a patched layer, themselves not patched."""
    return [
        i
        for i, block in enumerate(layer_map.blocks)
        if len(block) == 1 and i not in patched and patched & {i - 1, i + 1}
    ]


def all_sets(layer_map: LayerMap) -> list[PatchedLayers]:
    """Every set between student and teacher, by size.

    Raises ValueError where there are too many to measure.
    """
    if layer_map.max_layers_to_patch > MOST_PATCHABLE:
        raise ValueError(
            f"this student has {layer_map.max_layers_to_patch} patchable layers: every set is "
            f"measured for at most {MOST_PATCHABLE}, leave out --exact and widen --beam instead"
        )
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
    """Nested sets of sizes 1 to max - 1 as the explicit order whose sizes they are: the single
    ones of a step stand before its patchable layer.
    """
    order: list[int] = []
    for patched in (*sets, frozenset(range(len(layer_map.kept)))):
        step = patched - set(order)
        order += sorted(step, key=lambda i: (i in layer_map.patchable, i))
    return tuple(order)
