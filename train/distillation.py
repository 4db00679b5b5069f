"""Distillation on one page: the teacher's forward pass, the student's, and the loss they return.

Each student layer stands for a block of teacher layers. The student learns to predict the next (or
masked) token, to predict it as the teacher does, and to reach the end of each block with the hidden
state that the teacher has there, so that any block can later take its layer's place. On a
micro-batch, `distillation_forward` therefore

1. runs the teacher and keeps its hidden states at the ends of blocks,
2. runs the student and compares each of its hidden states as soon as it appears (cosine),
3. lets both output heads read the last pair, after the final norms (cross entropy and KL),
4. returns the weighted sum as this micro-batch's share of the optimizer step's loss.

The formula is in `train.loss`, and `install_distillation_forward` turns all of this into the
student's own `forward`. Shapes: B rows, T positions, N target positions, D hidden size.
"""

import types

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patching.architectures.models import predicts_masked_tokens
from patching.blocks import LayerMap
from patching.running.hidden_states import (
    before_output_embeddings,
    hidden_states_at,
    visit_hidden_states,
)
from patching.running.logits import UNCHANGED, LogitChange, logit_change
from train.loss import (
    LossTerms,
    LossWeights,
    StepCounts,
    cosine_distance,
    distillation_loss,
    is_compared,
    targets_at,
)
from train.sharding import gather
from train.vocabulary_loss import TopTokens


def distillation_forward(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    student_indices: tuple[int, ...],
    weights: LossWeights,
    counts: StepCounts,
    input_ids_BT: Tensor,
    labels_BT: Tensor,
    attention_mask_BT: Tensor | None,
    positions_BT: Tensor | None = None,
    change: LogitChange = UNCHANGED,
    teacher_top: TopTokens | None = None,
    few_targets: bool = False,
    num_documents: int | None = None,
) -> LossTerms:
    """Return a micro-batch's share of the loss of an optimizer step that has `counts` positions.

    `student_indices` are the student's hidden states to compare, in order. Calling `teacher`
    returns its states in the same order. Labels are those of `train.loss.targets_at`, and the
    negative ones of `train.loss` elsewhere. `teacher_top` are the teacher's predictions from a
    cache, in place of `teacher`. With `positions_BT`, which start over at each document of a row,
    documents do not see each other; `num_documents` is how many there are. `change` is what both
    models do to the output of their heads. With `few_targets`, heads only run where there is one.
    """
    # 1. The teacher's hidden states.
    inputs = (input_ids_BT, attention_mask_BT, positions_BT, num_documents)
    teacher_states = {}
    if teacher is not None:
        with torch.no_grad():
            teacher_states = dict(zip(student_indices, teacher(*inputs)))

    # 2. The student's hidden states. Each teacher state is freed once it has been compared.
    is_compared_BT = is_compared(labels_BT)
    cosine_distances, last_pair = [], []

    def compare(j: int, student_BTD: Tensor) -> None:
        teacher_BTD = teacher_states.pop(j, None)
        if weights.cosine:
            distance = cosine_distance(
                student_BTD, teacher_BTD, is_compared_BT, weights.compile_backend
            )
            cosine_distances.append(distance)
        if j == student_indices[-1]:
            last_pair.extend((student_BTD, teacher_BTD))

    visit_hidden_states(student, student_indices, compare, *inputs)

    # 3. What the output heads read at target positions. Logits are only computed inside the loss.
    student_head = student.get_output_embeddings()
    teacher_head = None if teacher is None else teacher.get_output_embeddings()
    student_ND, teacher_ND, targets_N = None, None, None
    if weights.needs_logits:
        is_masked_model = predicts_masked_tokens(student.config)
        if is_masked_model:  # a causal model's head is gathered along with its final norm
            gather(student_head)
            gather(teacher_head)  # and stays so, because its weights never change
        student_BTD, teacher_BTD = last_pair
        targets_BT = targets_at(labels_BT, is_masked_model)
        is_target_BT = None
        if is_masked_model or few_targets or attention_mask_BT is not None:
            is_target_BT = targets_BT >= 0  # the host waits for the device to count them
        if teacher is not None:
            with torch.no_grad():
                teacher_ND = before_output_embeddings(teacher, _at(is_target_BT, teacher_BTD))
        if teacher_top is not None:
            teacher_top = TopTokens(*(_at(is_target_BT, values) for values in teacher_top))
        student_ND = before_output_embeddings(student, _at(is_target_BT, student_BTD))
        targets_N = _at(is_target_BT, targets_BT)

    # 4. The loss.
    return distillation_loss(
        student_ND,
        teacher_ND,
        student_head,
        teacher_head,
        targets_N,
        cosine_distances,
        weights,
        counts,
        change,
        teacher_top,
    )


def _at(is_target_BT: Tensor | None, values: Tensor) -> Tensor:
    """Return the values at target positions, or at all positions if nearly all have a target. The
    loss then skips the others.
    """
    return values.flatten(0, 1) if is_target_BT is None else values[is_target_BT]


def install_distillation_forward(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    layer_map: LayerMap,
    weights: LossWeights,
) -> None:
    """Make `student(...)` return the loss of a micro-batch, and `teacher(...)` its hidden states.

    Whatever wraps the student, such as autocast, DDP or FSDP, then wraps the whole computation. In
    eval mode, cross entropy and KL are always computed. The teacher is frozen. With the cosine term
    alone no head runs, and an untied head of the student is frozen too. Without a teacher, batches
    bring its predictions from a cache.

    Raises ValueError if it is not known how the student's logits follow from its head.
    """
    change = logit_change(student)
    assert teacher is not None or not weights.cosine
    pairs = layer_map.alignment_pairs if weights.cosine else layer_map.alignment_pairs[-1:]
    student_indices, teacher_indices = zip(*pairs)
    if not weights.needs_logits and not student.config.tie_word_embeddings:
        student.get_output_embeddings().requires_grad_(False)

    def teacher_forward(self: PreTrainedModel, *inputs: Tensor | int | None) -> list[Tensor]:
        return hidden_states_at(self, teacher_indices, *inputs)

    def student_forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        counts: StepCounts,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        teacher_top: list[Tensor] | None = None,
        few_targets: bool = False,
        num_documents: int | None = None,
    ) -> LossTerms:
        active = weights if self.training else weights.for_evaluation()
        top = None if teacher_top is None else TopTokens.unpacked(teacher_top)
        inputs = (input_ids, labels, attention_mask, position_ids, change, top)
        return distillation_forward(
            self, teacher, student_indices, active, counts, *inputs, few_targets, num_documents
        )

    # Bound methods, which accelerate knows how to wrap.
    if teacher is not None:
        teacher.eval().requires_grad_(False)
        teacher.forward = types.MethodType(teacher_forward, teacher)
    student.forward = types.MethodType(student_forward, student)
