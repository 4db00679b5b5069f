"""What happens to the residual stream where student layers meet teacher layers, in memory.

A run of student layers reads the teacher's stream at one end and writes to it at the other. Each
such junction lies between two layers, so a hook before the later one can change the stream there:
rotate it, or give it the length or the direction that it has in the unpatched model.

Shapes: B rows, T positions, N tokens that are not padding, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.blocks import LayerMap
from patching.recipe import Recipe
from patching.running.hidden_states import hidden_states_at

Change = Callable[[Tensor, int], Tensor]
"""Called with the stream, of shape (B, T, D), and the index of the batch."""
Batches = Sequence[Mapping[str, Tensor]]
"""Each has `input_ids` and `attention_mask`, both of shape (B, T)."""


class Junction(NamedTuple):
    """A place where student layers meet teacher layers."""

    depth: int
    """The number of layers of the model before it."""
    state: int
    """The student's hidden state there."""
    into_teacher: bool
    """Whether teacher layers follow."""


def junctions(recipe: Recipe) -> Iterator[Junction]:
    position = {source: depth for depth, source in enumerate(s[:2] for s in recipe.layers)}
    for run in recipe.student_runs:
        start = position["student", run[0]]
        end = start + len(run)
        if start > 0:
            yield Junction(start, run[0], into_teacher=False)
        if end < recipe.depth:
            yield Junction(end, run[-1] + 1, into_teacher=True)


@contextmanager
def changed(model: PreTrainedModel, changes: Mapping[int, Change], batch: int) -> Iterator[None]:
    """Change the stream before some layers, by their depth, while a batch is run."""
    layers = model.get_submodule(architecture_of(model.config).layers)

    def before(change: Change):
        def hook(_layer, args, kwargs):
            if args:
                return (change(args[0], batch), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"], batch)}

        return hook

    with ExitStack() as undo:
        for depth, change in changes.items():
            handle = layers[depth].register_forward_pre_hook(before(change), with_kwargs=True)
            undo.callback(handle.remove)
        yield


def times(factor: float) -> Change:
    return lambda state_BTD, _batch: state_BTD * factor


@dataclass(frozen=True)
class AlignedStates:
    """The hidden states of the unpatched student and teacher where they are aligned.

    `student[i][b]` and `teacher[i][b]` have the shape (B, T, D), for student state i and batch b.
    """

    student: list[list[Tensor]]
    teacher: list[list[Tensor]]
    masks: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        layer_map: LayerMap,
        batches: Batches,
    ) -> "AlignedStates":
        pairs = layer_map.alignment_pairs[:-1]  # the last one is after the final norms
        states = []
        for model, indices in zip((student, teacher), zip(*pairs)):
            of_batches = [
                hidden_states_at(model, indices, batch["input_ids"], batch["attention_mask"])
                for batch in batches
            ]
            states.append([list(of_state) for of_state in zip(*of_batches)])
        return cls(*states, [batch["attention_mask"].bool() for batch in batches])

    def rotation(self, i: int) -> Tensor:
        """Return the orthogonal matrix R that brings the student's state i closest to the
        teacher's: s R is like t (Procrustes). Each token counts the same, whatever its length, so
        that massive activations do not decide.
        """
        s_ND, t_ND = (
            torch.nn.functional.normalize(
                torch.cat([state[mask] for state, mask in zip(states[i], self.masks)]), dim=-1
            )
            for states in (self.student, self.teacher)
        )
        left, _, right = torch.linalg.svd(s_ND.T @ t_ND)
        return left @ right

    def rotations(self, recipe: Recipe) -> dict[int, Change]:
        """Rotate the stream at each junction into the basis of the layers that follow."""

        def rotate(junction: Junction) -> Change:
            matrix_DD = self.rotation(junction.state)
            if not junction.into_teacher:
                matrix_DD = matrix_DD.T
            return lambda state_BTD, _batch: state_BTD @ matrix_DD

        return {junction.depth: rotate(junction) for junction in junctions(recipe)}

    def given(self, recipe: Recipe, what: str) -> dict[int, Change]:
        """Give the stream at each junction the `length` or the `direction` that it has, token by
        token, in the unpatched model that the layers that follow come from.
        """

        def give(junction: Junction) -> Change:
            states = self.teacher if junction.into_teacher else self.student

            def change(state_BTD: Tensor, batch: int) -> Tensor:
                target_BTD = states[junction.state][batch]
                if what == "direction":
                    state_BTD, target_BTD = target_BTD, state_BTD
                length_BT1 = target_BTD.norm(dim=-1, keepdim=True)
                return torch.nn.functional.normalize(state_BTD, dim=-1) * length_BT1

            return change

        return {junction.depth: give(junction) for junction in junctions(recipe)}


@torch.no_grad()
def gap_factors(teacher: PreTrainedModel, recipe: Recipe, batches: Batches) -> dict[int, float]:
    """Return for each gap in a pruned teacher's layers, by its depth, the median over tokens of how
    much longer the stream is after the missing layers than before them.
    """
    kept = [-1, *(source.layer_idx for source in recipe.layers)]
    gaps = {
        depth: (before + 1, after)
        for depth, (before, after) in enumerate(pairwise(kept))
        if after != before + 1
    }
    lengths: dict[int, list[Tensor]] = {i: [] for ends in gaps.values() for i in ends}
    for batch in batches if gaps else ():
        mask_BT = batch["attention_mask"]
        states = hidden_states_at(teacher, list(lengths), batch["input_ids"], mask_BT)
        for of_state, state_BTD in zip(lengths.values(), states):
            of_state.append(state_BTD.norm(dim=-1)[mask_BT.bool()])
    joined = {i: torch.cat(of_state) for i, of_state in lengths.items()}
    return {
        depth: (joined[after] / joined[before]).median().item()
        for depth, (before, after) in gaps.items()
    }
