"""The distillation loss (arXiv 2510.05064, section 3), as pure functions of tensors.

    L = CE(z_S, y) + w_kl T^2 KL(softmax(z_T / T) || softmax(z_S / T)) + w_cos / (M + 1) sum over
    pairs (1 - cos(h_S, h_T))

CE and KL are means over target positions, the cosine distance is a mean over real positions, and
both means are over the whole optimiser step, so that the result does not depend on how the step is
split.

Shapes: B rows, T positions, D hidden size.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patching.divergence import vocabulary_loss

IGNORED_LABEL = -100


class LossWeights(NamedTuple):
    """Weight of each term; a term of weight 0 costs nothing."""

    cross_entropy: float
    kl: float
    cosine: float
    temperature: float

    @property
    def needs_logits(self) -> bool:
        return bool(self.cross_entropy or self.kl)


class StepCounts(NamedTuple):
    """What the means of one optimiser step divide by, summed over its micro-batches and ranks."""

    targets: Tensor
    positions: Tensor


class LossTerms(NamedTuple):
    """A micro-batch's share of the step's loss and of each unweighted mean."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    cosine: Tensor


def count(labels_BT: Tensor) -> StepCounts:
    """Target positions, which have a real next token, and real positions of a micro-batch."""
    is_real_BT = labels_BT != IGNORED_LABEL
    return StepCounts(targets=is_real_BT[:, 1:].sum(), positions=is_real_BT.sum())


def cosine_distance(pairs: Iterable[tuple[Tensor, Tensor]], is_real_BT: Tensor) -> Tensor:
    """Mean over (student, teacher) hidden-state pairs of the sum over real positions of 1 -
    cos(h_S, h_T).

    Each state has shape (B, T, D). The teacher's get no gradient.
    """
    distances = [
        (
            1
            - nn.functional.cosine_similarity(
                student_BTD.float(), teacher_BTD.detach().float(), dim=-1
            )
        )[is_real_BT].sum()
        for student_BTD, teacher_BTD in pairs
    ]
    return torch.stack(distances).mean()


def distillation_loss(
    student_states_BTD: list[Tensor],
    teacher_states_BTD: list[Tensor],
    student_head: nn.Module,
    teacher_head: nn.Module,
    labels_BT: Tensor,
    weights: LossWeights,
    counts: StepCounts,
) -> LossTerms:
    """A micro-batch's share of the loss above; the shares of a step's micro-batches add up to it.

    The lists hold the aligned hidden states; the last of each is after the final norm and feeds the
    head. `labels_BT` are the tokens themselves, not shifted, with IGNORED_LABEL at padding.
    """
    zero = student_states_BTD[-1].new_zeros((), dtype=torch.float32)
    loss, cross_entropy, kl, cosine = zero, zero, zero, zero
    if weights.needs_logits:
        targets_BT = labels_BT[:, 1:]
        is_target_BT = targets_BT != IGNORED_LABEL
        terms = vocabulary_loss(
            student_states_BTD[-1][:, :-1][is_target_BT],
            student_head,
            targets_BT[is_target_BT],
            teacher_states_BTD[-1][:, :-1][is_target_BT],
            teacher_head,
            cross_entropy_weight=weights.cross_entropy,
            kl_weight=weights.kl * weights.temperature**2,
            temperature=weights.temperature,
        )
        loss = loss + terms.loss / counts.targets
        cross_entropy, kl = terms.cross_entropy / counts.targets, terms.kl / counts.targets
    if weights.cosine:
        pairs = zip(student_states_BTD, teacher_states_BTD, strict=True)
        cosine = cosine_distance(pairs, labels_BT != IGNORED_LABEL) / counts.positions
        loss = loss + weights.cosine * cosine
    return LossTerms(loss, cross_entropy.detach(), kl.detach(), cosine.detach())
