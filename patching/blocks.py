"""Which teacher layers each student layer stands for: the arithmetic everything else follows from.

A student keeps some of the teacher's N layers. Student layer i stands for the teacher layers from
its own up to the next kept one:

    teacher block i = range(kept[i], kept[i + 1])        (the last block ends at N)

Patching student layer i replaces it with its whole block (arXiv 2510.05064, section 2). Everything
here is integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

Order = Literal["last", "first"] | tuple[int, ...]
"""The sequence in which student layers are patched as k grows: from the last to the first, from the
first to the last, or an explicit list of student layers (see `LayerMap.sequence`).
"""


def default_kept_layers(
    num_teacher_layers: int,
    alternate_every_n_layers: int,
    first_layers_to_keep: int,
    last_layers_to_keep: int,
) -> tuple[int, ...]:
    """Return the teacher layers to keep: the first ones, every n-th from the last of those on, and
    the last ones.

    For some numbers this differs from the paper's code, which then leaves student layers unaligned.
    For the published models the layers are the same.

    Raises ValueError if a number is outside 1..num_teacher_layers.
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
    """The teacher block of each student layer, and what follows from the blocks.

    Raises ValueError unless `kept` starts at 0, increases, and stays below `num_teacher_layers`.
    """

    kept: tuple[int, ...]
    """kept[i] is the teacher layer that student layer i was initialized from."""
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
        """The teacher block of each student layer. Together they partition the teacher's layers."""
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
        """Pairs (student hidden state, teacher hidden state) that distillation compares: the
        embeddings, then the end of each block.

        Hidden state j is the activation after j layers. The last pair is taken after the final
        norms.
        """
        return ((0, 0), *((i + 1, block.stop) for i, block in enumerate(self.blocks)))

    def sequence(self, order: Order) -> tuple[int, ...]:
        """Return all student layers in the sequence in which they are patched.

        A layer with a single-layer block adds no depth. It is patched together with the next
        patchable layer in the sequence. An explicit order must name every patchable layer once and
        may name the others. Layers that it does not name come last.

        Raises ValueError for an explicit order that does not.
        """
        layers = range(len(self.kept))
        if order == "last":
            return tuple(reversed(layers))
        if order == "first":
            # Layers between two patchable ones are patched with the first of the two, so they come
            # before it.
            stops = [0, *self.patchable[1:], len(self.kept)]
            groups = [range(start, stop) for start, stop in pairwise(stops)]
            return tuple(
                i for group in groups for i in sorted(group, key=self.patchable.__contains__)
            )
        if isinstance(order, str):
            raise ValueError(f"order={order}: choose last or first, or name the student layers")
        problems = []
        if len(set(order)) != len(order):
            problems.append("it names a layer twice")
        if unknown := sorted(set(order) - set(layers)):
            problems.append(f"the student has layers 0-{layers[-1]}, not {as_layer_list(unknown)}")
        if missing := sorted(set(self.patchable) - set(order)):
            problems.append(f"it leaves out the patchable layers {as_layer_list(missing)}")
        if problems:
            raise ValueError(f"order {as_layer_list(order)}: {'; '.join(problems)}")
        return (*order, *sorted(set(layers) - set(order)))

    def patched_layers(self, num_layers_to_patch: int, order: Order) -> frozenset[int]:
        """Return the student layers replaced at size k: the sequence up to the k-th patchable one.

        At k = max these are all layers, so that the model is the teacher itself.

        Raises ValueError if k is outside 0..max_layers_to_patch.
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
        """Return how many of the given student layers are patchable: the size k of that set.

        Raises ValueError if the set holds a layer that the student does not have.
        """
        if unknown := sorted(patched_layers - set(range(len(self.kept)))):
            raise ValueError(
                f"patched_layers={as_layer_list(sorted(patched_layers))}: this student has layers "
                f"0-{len(self.kept) - 1}, not {as_layer_list(unknown)}"
            )
        return len(patched_layers & set(self.patchable))


def as_layer_list(layers: Sequence[int]) -> str:
    """Return layers as text for messages: `0,2,4`."""
    return ",".join(map(str, layers))
