"""The distillation loss (arXiv 2510.05064, section 3), as pure functions of tensors.

    L = CE(z_S, y) + w_kl T^2 KL(softmax(z_T / T) || softmax(z_S / T)) + w_cos / (M + 1) sum over
    pairs (1 - cos(h_S, h_T))

CE and KL are means over target positions (those with a real next token, or, for a masked language
model, the masked ones), the cosine distance is a mean over real positions, and both means are over
the whole optimiser step, so that the result does not depend on how the step is split.

Shapes: B rows, T positions, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.vocabulary_loss import vocabulary_loss

IGNORED_LABEL = -100
"""Label of a padding position."""
NO_TARGET = -101
"""Label of a real position at which a masked language model has nothing to predict."""
SMALLEST_LENGTH = 1e-8
"""A hidden state shorter than this counts as this long."""


class LossWeights(NamedTuple):
    """Weight of each term; a term of weight 0 costs nothing."""

    cross_entropy: float
    kl: float
    cosine: float
    temperature: float

    @property
    def needs_logits(self) -> bool:
        return bool(self.cross_entropy or self.kl)

    def for_evaluation(self) -> "LossWeights":
        """The same with cross entropy and KL always measured."""
        return self._replace(cross_entropy=self.cross_entropy or 1.0, kl=self.kl or 1.0)


def active_terms(weights: LossWeights) -> list[str]:
    return [name for name in ("cross_entropy", "kl", "cosine") if getattr(weights, name)]


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


def targets_at(labels_BT: Tensor, is_masked_model: bool) -> Tensor:
    """The token that each position is to predict, negative where there is none.

    A causal model's labels are the tokens themselves, and the next one is predicted; a masked
    model's are what the masked positions hid.
    """
    if is_masked_model:
        return labels_BT
    return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)


def count(labels_BT: Tensor, is_masked_model: bool = False) -> StepCounts:
    """Target positions and real positions of a micro-batch."""
    targets_BT = targets_at(labels_BT, is_masked_model)
    return StepCounts(targets=(targets_BT >= 0).sum(), positions=(labels_BT != IGNORED_LABEL).sum())


def cosine_distance(student_BTD: Tensor, teacher_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
    """Sum over real positions of 1 - cos(h_S, h_T), for one pair of hidden states.

    Differentiable in the student, once. The gradient is formed at once and is all that is kept, so
    the teacher's state can go as soon as the student's has been compared with it.
    """
    return _CosineDistance.apply(student_BTD, teacher_BTD, is_real_BT)


class _CosineDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_BTD: Tensor, teacher_BTD: Tensor, is_real_BT: Tensor) -> Tensor:
        def unit(hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
            hidden_BTD = hidden_BTD.float()
            length_BT1 = hidden_BTD.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH)
            return hidden_BTD / length_BT1, length_BT1

        with torch.autocast(student_BTD.device.type, enabled=False):
            student_BTD, length_BT1, dtype = *unit(student_BTD), student_BTD.dtype
            teacher_BTD, _ = unit(teacher_BTD)
            cosine_BT1 = (student_BTD * teacher_BTD).sum(-1, keepdim=True)
            is_real_BT1 = is_real_BT[..., None]
            if ctx.needs_input_grad[0]:
                # d(1 - cos) / ds = (cos s / |s| - t / |t|) / |s|, a step on the unit sphere
                gradient_BTD = (cosine_BT1 * student_BTD - teacher_BTD) / length_BT1 * is_real_BT1
                ctx.gradient = gradient_BTD.to(dtype)
            return ((1 - cosine_BT1) * is_real_BT1).sum()

    @staticmethod
    def backward(ctx, distance_gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient_BTD, ctx.gradient = ctx.gradient, None
        return gradient_BTD.mul_(distance_gradient), None, None


def _as_it_is(hidden_ND: Tensor) -> Tensor:
    return hidden_ND


def distillation_loss(
    student_hidden_BTD: Tensor,
    teacher_hidden_BTD: Tensor,
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    labels_BT: Tensor,
    cosine_distances: list[Tensor],
    weights: LossWeights,
    counts: StepCounts,
    is_masked_model: bool = False,
    student_transform: Callable[[Tensor], Tensor] = _as_it_is,
    teacher_transform: Callable[[Tensor], Tensor] = _as_it_is,
) -> LossTerms:
    """A micro-batch's share of the loss above; the shares of a step's micro-batches add up to it.

    The hidden states are those after the final norms, which feed the heads; the transforms are what
    an encoder does between the two, at its targets alone. Labels are as `targets_at` has them, not
    shifted, with IGNORED_LABEL at padding. `cosine_distances` holds `cosine_distance` of each
    aligned pair.
    """
    zero = labels_BT.new_zeros((), dtype=torch.float32)
    loss, cross_entropy, kl, cosine = zero, zero, zero, zero
    if weights.needs_logits:
        targets_BT = targets_at(labels_BT, is_masked_model)
        is_target_BT = targets_BT >= 0
        with torch.no_grad():
            teacher_hidden_ND = teacher_transform(teacher_hidden_BTD[is_target_BT])
        terms = vocabulary_loss(
            student_transform(student_hidden_BTD[is_target_BT]),
            student_head,
            targets_BT[is_target_BT],
            teacher_hidden_ND,
            teacher_head,
            cross_entropy_weight=weights.cross_entropy,
            kl_weight=weights.kl * weights.temperature**2,
            temperature=weights.temperature,
        )
        loss = loss + terms.loss / counts.targets
        cross_entropy, kl = terms.cross_entropy / counts.targets, terms.kl / counts.targets
    if weights.cosine:
        cosine = torch.stack(cosine_distances).mean() / counts.positions
        loss = loss + weights.cosine * cosine
    return LossTerms(loss, cross_entropy.detach(), kl.detach(), cosine.detach())
