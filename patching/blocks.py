"""Which teacher layers each student layer stands for: the arithmetic everything else follows from.

A student keeps some teacher layers, and student layer i stands for the teacher layers from its own
up to the next kept one:

    teacher block i = range(kept[i], kept[i + 1])        (the last block ends at N)

Patching student layer i puts its whole block in its place. Everything here is integers (arXiv
2510.05064, section 2); no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

Order = Literal["last", "first"] | tuple[int, ...]
"""The sequence in which student layers are patched as k grows: from the last towards the first,
from the first, or the layers themselves (see `LayerMap.sequence`).
"""


def default_kept_layers(
    num_teacher_layers: int,
    alternate_every_n_layers: int,
    first_layers_to_keep: int,
    last_layers_to_keep: int,
) -> tuple[int, ...]:
    """The first layers, every n-th one from the last of those, and the tail, as 0-based teacher
    layers.

    On some remainders this differs from the paper's code, which leaves layers unaligned there; the
    published models' layers come out the same.

    Raises ValueError where a number lies outside 1..num_teacher_layers.
    """
    problems = [
        f"{name}={value}: this teacher has {num_teacher_layers} layers, "
        f"choose 1-{num_teacher_layers}"
        for name, value in (
            ("alternate_every_n_layers", alternate_every_n_layers),
            ("first_layers_to_keep", first_layers_to_keep),
            ("last_layers_to_keep", last_layers_to_keep),
        )
        if not 1 <= value <= num_teacher_layers
    ]
    if problems:
        raise ValueError("; ".join(problems))
    first = range(first_layers_to_keep)
    alternating = range(first_layers_to_keep - 1, num_teacher_layers, alternate_every_n_layers)
    last = range(num_teacher_layers - last_layers_to_keep, num_teacher_layers)
    return tuple(sorted({*first, *alternating, *last}))


@dataclass(frozen=True)
class LayerMap:
    """How a student's layers map onto its teacher's.

    Raises ValueError unless `kept` starts at 0, increases, and stays below `num_teacher_layers`.
    """

    kept: tuple[int, ...]
    """Teacher layer that student layer i was initialised from."""
    num_teacher_layers: int

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip(self.kept, self.kept[1:]))
        if (
            not self.kept
            or self.kept[0] != 0
            or not increasing
            or self.kept[-1] >= self.num_teacher_layers
        ):
            raise ValueError(
                f"kept layers {list(self.kept)}: they must start at 0, increase, and stay below "
                f"the teacher's {self.num_teacher_layers} layers"
            )

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """Teacher block of each student layer; together they partition the teacher's layers."""
        stops = (*self.kept[1:], self.num_teacher_layers)
        return tuple(range(start, stop) for start, stop in zip(self.kept, stops))

    @cached_property
    def patchable(self) -> tuple[int, ...]:
        """Student layers whose block is longer than one layer."""
        return tuple(i for i, block in enumerate(self.blocks) if len(block) > 1)

    @property
    def max_layers_to_patch(self) -> int:
        """The k at which the patched model is the teacher."""
        return len(self.patchable)

    @cached_property
    def alignment_pairs(self) -> tuple[tuple[int, int], ...]:
        """(student hidden state, teacher hidden state) to compare: embeddings, then the end of each
        block.

        Hidden state j is the activation after j layers; the last pair is after each model's final
        norm.
        """
        return ((0, 0), *((i + 1, block.stop) for i, block in enumerate(self.blocks)))

    def sequence(self, order: Order) -> tuple[int, ...]:
        """Student layers in the sequence they are patched: the families along one order are nested.

        A layer whose block is a single one adds no depth; it comes along with the patchable layer
        behind it in the sequence. An explicit order names every patchable layer once, and may name
        the others too; those it leaves out come last.

        Raises ValueError for an explicit order that does not.
        """
        layers = range(len(self.kept))
        if order == "last":
            return tuple(reversed(layers))
        if order == "first":
            # Layers between two patchable ones come along with the earlier, so they stand before
            # it.
            stops = [0, *self.patchable[1:], len(self.kept)]
            groups = [range(start, stop) for start, stop in pairwise(stops)]
            return tuple(
                i for group in groups for i in sorted(group, key=self.patchable.__contains__)
            )
        if isinstance(order, str):
            raise ValueError(f"order={order}: choose last or first, or name the student layers")
        problems = []
        if len(set(order)) != len(order):
            problems.append("a layer stands in it twice")
        if unknown := sorted(set(order) - set(layers)):
            problems.append(f"the student has layers 0-{layers[-1]}, not {as_layer_list(unknown)}")
        if missing := sorted(set(self.patchable) - set(order)):
            problems.append(f"it leaves out the patchable layers {as_layer_list(missing)}")
        if problems:
            raise ValueError(f"order {as_layer_list(order)}: {'; '.join(problems)}")
        return (*order, *sorted(set(layers) - set(order)))

    def patched_layers(self, num_layers_to_patch: int, order: Order) -> frozenset[int]:
        """The student layers replaced at size k: the order's sequence up to its k-th patchable
        layer.

        Single-layer blocks at the patched end come from the teacher too, so that k = max is the
        teacher itself.

        Raises ValueError where k lies outside 0..max_layers_to_patch.
        """
        k, k_max = num_layers_to_patch, self.max_layers_to_patch
        if not 0 <= k <= k_max:
            allowed = f"choose 0-{k_max}" if k_max else "only 0 is possible"
            raise ValueError(
                f"num_layers_to_patch={k}: this student has {k_max} patchable layers, {allowed}"
            )
        sequence = self.sequence(order)
        if k in (0, k_max):
            return frozenset(sequence) if k else frozenset()
        patchable = [position for position, i in enumerate(sequence) if i in self.patchable]
        return frozenset(sequence[: patchable[k - 1] + 1])

    def num_patched(self, patched_layers: frozenset[int]) -> int:
        """How many patchable layers a set holds: its k, were it on the order.

        Raises ValueError where the set holds a layer the student does not have.
        """
        if unknown := sorted(patched_layers - set(range(len(self.kept)))):
            raise ValueError(
                f"patched_layers={as_layer_list(sorted(patched_layers))}: this student has layers "
                f"0-{len(self.kept) - 1}, not {as_layer_list(unknown)}"
            )
        return len(patched_layers & set(self.patchable))


def as_layer_list(layers: Sequence[int]) -> str:
    """Layers as text for a person: `0,2,4`."""
    return ",".join(map(str, layers))
