"""TODO."""

import types
from functools import partial

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
from train.loss import (
    IGNORED_LABEL,
    LossTerms,
    LossWeights,
    StepCounts,
    cosine_distance,
    distillation_loss,
)
from train.sharding import gather, release


def install_distillation_forward(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: LayerMap, weights: LossWeights
) -> None:
    """Make `student(...)` return the distillation loss of a micro-batch, and freeze the teacher,
    whose own call returns its aligned hidden states.

    With the cosine term alone no head is run, and an untied head of the student is frozen with it.
    """
    is_masked_model = predicts_masked_tokens(student.config)
    teacher.eval().requires_grad_(False)
    pairs = layer_map.alignment_pairs if weights.cosine else layer_map.alignment_pairs[-1:]
    student_indices, teacher_indices = zip(*pairs)
    if not weights.needs_logits and not student.config.tie_word_embeddings:
        student.get_output_embeddings().requires_grad_(False)

    def teacher_forward(
        self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None
    ) -> list[Tensor]:
        return hidden_states_at(self, teacher_indices, input_ids, attention_mask)

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        counts: StepCounts,
        attention_mask: Tensor | None = None,
    ) -> LossTerms:
        with torch.no_grad():
            teacher_states = dict(zip(student_indices, teacher(input_ids, attention_mask)))
        is_real_BT = labels != IGNORED_LABEL
        last, last_pair, distances = student_indices[-1], [], []

        def compare(j: int, student_BTD: Tensor) -> None:
            teacher_BTD = teacher_states.pop(j)
            if weights.cosine:
                distances.append(cosine_distance(student_BTD, teacher_BTD, is_real_BT))
            if j == last:
                last_pair.extend((student_BTD, teacher_BTD))

        visit_hidden_states(self, student_indices, compare, input_ids, attention_mask)
        if is_masked_model and weights.needs_logits:
            gather(self.get_output_embeddings())
            gather(teacher.get_output_embeddings())
        terms = distillation_loss(
            *last_pair,
            self.get_output_embeddings(),
            teacher.get_output_embeddings(),
            labels,
            distances,
            weights if self.training else weights.for_evaluation(),
            counts,
            is_masked_model,
            partial(before_output_embeddings, self),
            partial(before_output_embeddings, teacher),
        )
        release(teacher.get_output_embeddings())
        return terms

    student.forward = types.MethodType(forward, student)
    teacher.forward = types.MethodType(teacher_forward, teacher)
