"""The distillation loss (arXiv 2510.05064, section 3), as pure functions of tensors.

    L = CE(z_S, y) + w_kl T^2 KL(softmax(z_T / T) || softmax(z_S / T))
        + w_cos / (M + 1) sum over aligned pairs (1 - cos(h_S, h_T))

CE and KL are means over target positions: those with a real next token for a causal model, the
masked ones for a masked language model. The cosine term is a mean over compared positions: all that
are not padding, or in chats those of responses. All means are over the whole optimizer step, so the
result does not depend on how the step is split into micro-batches and ranks.

Shapes: B rows, T positions, N target positions, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patching.running.logits import UNCHANGED, LogitChange
from train.fused import fused
from train.loss_weights import LossWeights
from train.vocabulary_loss import TopTokens, vocabulary_loss

IGNORED_LABEL = -100
"""Label of a padding position."""
NO_TARGET = -101
"""Label of a real token that is not to be predicted: one that a masked language model sees, or the
first one of a document that does not see the document before it.
"""
CONTEXT = -102
"""Label of a token that is only read, such as one of a prompt: its hidden states are not compared,
and it is not to be predicted.
"""
SMALLEST_NORM = 1e-8
"""Smaller norms of hidden states are treated as this, to avoid dividing by zero."""


class StepCounts(NamedTuple):
    """Target and compared positions of a whole optimizer step, which its means are divided by."""

    targets: Tensor
    positions: Tensor


class LossTerms(NamedTuple):
    """One micro-batch's share of the step's loss and of each unweighted mean."""

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor
    cosine: Tensor
    cosine_by_state: Tensor
    """The cosine term of each aligned pair, empty if it is off."""


def targets_at(labels_BT: Tensor, is_masked_model: bool) -> Tensor:
    """Return the token to predict at each position, negative where there is none.

    The labels of a causal model are the tokens themselves, and the next one is predicted. The
    labels of a masked language model are the hidden tokens, at the masked positions.
    """
    if is_masked_model:
        return labels_BT
    return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)


def count(labels_BT: Tensor, is_masked_model: bool = False) -> StepCounts:
    """Count the target positions and the compared positions of a micro-batch."""
    targets_BT = targets_at(labels_BT, is_masked_model)
    return StepCounts(targets=(targets_BT >= 0).sum(), positions=is_compared(labels_BT).sum())


def is_compared(labels_BT: Tensor) -> Tensor:
    """Return the positions whose hidden states the cosine term compares."""
    return (labels_BT != IGNORED_LABEL) & (labels_BT != CONTEXT)


def distillation_loss(
    student_ND: Tensor | None,
    teacher_ND: Tensor | None,
    student_head: nn.Linear,
    teacher_head: nn.Linear | None,
    targets_N: Tensor | None,
    cosine_distances: list[Tensor],
    weights: LossWeights,
    counts: StepCounts,
    logit_change: LogitChange = UNCHANGED,
    teacher_top: TopTokens | None = None,
) -> LossTerms:
    """Return a micro-batch's share of the loss; the shares of all micro-batches of a step add up.

    `student_ND` and `teacher_ND` are the states that the heads read at target positions, and
    `targets_N` the tokens to predict there. All three may be None if the weights need no logits.
    `cosine_distances` holds the `cosine_distance` of each aligned pair. `logit_change` is what both
    models do to the output of their heads. `teacher_top` are the teacher's predictions from a
    cache, in place of its states and head.
    """
    zero = torch.zeros((), device=counts.positions.device)
    loss, cross_entropy, kl, cosine, cosine_by_state = zero, zero, zero, zero, zero.new_zeros(0)
    if weights.needs_logits:
        sums = vocabulary_loss(
            student_ND,
            student_head,
            targets_N,
            teacher_ND,
            teacher_head,
            teacher_top,
            cross_entropy_weight=weights.cross_entropy,
            kl_weight=weights.kl * weights.temperature**2,
            temperature=weights.temperature,
            logit_change=logit_change,
            compile_backend=weights.compile_backend,
        )
        loss = loss + sums.loss / counts.targets
        cross_entropy, kl = sums.cross_entropy / counts.targets, sums.kl / counts.targets
    if weights.cosine:
        cosine_by_state = torch.stack(cosine_distances) / counts.positions
        cosine = cosine_by_state.mean()
        loss = loss + weights.cosine * cosine
    terms = (cross_entropy, kl, cosine, cosine_by_state)
    return LossTerms(loss, *(term.detach() for term in terms))


def cosine_distance(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    is_compared_BT: Tensor,
    compile_backend: str | None = None,
) -> Tensor:
    """Return the sum over compared positions of 1 - cos(h_S, h_T) for one pair of hidden states.

    It can be differentiated once, with respect to the student. The gradient is computed right away
    and nothing else is kept, so the teacher's state can be freed as soon as it has been compared.
    """
    return _CosineDistance.apply(student_BTD, teacher_BTD, is_compared_BT, compile_backend)


class _CosineDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student_BTD: Tensor,
        teacher_BTD: Tensor,
        is_compared_BT: Tensor,
        compile_backend: str | None,
    ) -> Tensor:
        distance_and_gradient = fused(_cosine_distance_and_gradient, compile_backend)
        with torch.autocast(student_BTD.device.type, enabled=False):
            distance, ctx.gradient = distance_and_gradient(
                student_BTD.detach(), teacher_BTD, is_compared_BT, ctx.needs_input_grad[0]
            )
        return distance

    @staticmethod
    def backward(ctx, distance_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient_BTD, ctx.gradient = ctx.gradient, None
        return gradient_BTD.mul_(distance_gradient), None, None, None


def _cosine_distance_and_gradient(
    student_BTD: Tensor, teacher_BTD: Tensor, is_compared_BT: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sum over compared positions of 1 - cos(h_S, h_T), and its gradient with respect to
    the student's states.
    """
    s_BTD, t_BTD, is_compared_BT1 = (
        student_BTD.float(),
        teacher_BTD.float(),
        is_compared_BT[..., None],
    )
    s_norm_BT1 = s_BTD.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    t_norm_BT1 = t_BTD.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    cosine_BT1 = (s_BTD * t_BTD).sum(-1, keepdim=True) / s_norm_BT1 / t_norm_BT1
    gradient_BTD = None
    if needs_gradient:
        # d(1 - cos) / ds = (cos s / |s| - t / |t|) / |s|
        gradient_BTD = s_BTD * (cosine_BT1 / s_norm_BT1 / s_norm_BT1 * is_compared_BT1)
        gradient_BTD.addcmul_(t_BTD, -1 / s_norm_BT1 / t_norm_BT1 * is_compared_BT1)
        gradient_BTD = gradient_BTD.to(student_BTD.dtype)
    return ((1 - cosine_BT1) * is_compared_BT1).sum(), gradient_BTD
