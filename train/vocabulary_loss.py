"""Cross entropy and Kullback-Leibler divergence over a large vocabulary, in chunks of tokens.

The logits of a whole batch would be by far its largest tensors (151,936 entries per token for
Qwen3). Here they exist for one chunk of tokens at a time: the gradient of each chunk overwrites its
logits, and only its contribution to the gradients of the hidden states and the head is kept.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patching.running.chunks import CHUNK_LOGITS, CPU_SOFTMAX_LOGITS, slices
from patching.running.logits import UNCHANGED, LogitChange


class VocabularyLoss(NamedTuple):
    loss: Tensor
    """Weighted sum of both terms, the one to differentiate."""
    cross_entropy: Tensor
    """Sum over tokens of -log p_student(target), in nats; detached."""
    kl: Tensor
    """Sum over tokens of KL(teacher || student) at the temperature, in nats; detached."""


def vocabulary_loss(
    student_hidden_ND: Tensor,
    student_head: nn.Linear,
    targets_N: Tensor,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    *,
    cross_entropy_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
    logit_change: LogitChange = UNCHANGED,
) -> VocabularyLoss:
    """Return the sums over tokens of CE(z_S, y) and KL(softmax(z_T / T) || softmax(z_S / T)).

    `loss` is `cross_entropy_weight * cross_entropy + kl_weight * kl`. The factor T^2 of Hinton et
    al. (arXiv 1503.02531) belongs in `kl_weight`. A term of weight 0 is not computed and its sum is
    0. Gradients reach `student_hidden_ND` and the parameters of `student_head`, never the teacher.
    Softmaxes are computed in fp32. `logit_change` is what both models do to the output of their
    heads. The loss can be differentiated only once.

    Raises ValueError if `kl_weight` is not 0 and the teacher's states or head are missing.
    """
    if kl_weight and (teacher_hidden_ND is None or teacher_head is None):
        raise ValueError("the KL term needs the teacher's hidden states and head")
    return VocabularyLoss(
        *_ChunkedLoss.apply(
            (cross_entropy_weight, kl_weight, temperature),
            logit_change,
            targets_N,
            teacher_hidden_ND,
            teacher_head if kl_weight else None,
            student_hidden_ND,
            student_head.weight,
            student_head.bias,
        )
    )


def sums_and_gradient(
    logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    targets_N: Tensor,
    cross_entropy_weight: float,
    kl_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both sums over some tokens, and the gradient of their weighted sum with respect to
    the student's logits, all in fp32.
    """
    log_p_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
    cross_entropy = -log_p_NV.gather(-1, targets_N[:, None]).sum() * bool(cross_entropy_weight)
    if not kl_weight:
        gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight)
        kl = torch.zeros_like(cross_entropy)
    else:
        teacher_log_q_NV = _tempered(teacher_logits_NV, temperature)
        log_q_NV = log_p_NV if temperature == 1 else _tempered(logits_NV, temperature)
        teacher_q_NV = teacher_log_q_NV.exp()
        kl = teacher_log_q_NV.sub_(log_q_NV).mul_(teacher_q_NV).sum()
        weight = kl_weight / temperature
        if temperature == 1:
            gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight + weight)
        else:
            gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight)
            gradient_NV.add_(log_q_NV.exp_(), alpha=weight)
        gradient_NV.sub_(teacher_q_NV, alpha=weight)
    at_targets_N1 = gradient_NV.new_full((len(targets_N), 1), -cross_entropy_weight)
    gradient_NV.scatter_add_(-1, targets_N[:, None], at_targets_N1)
    return cross_entropy, kl, gradient_NV


def _tempered(logits_NV: Tensor, temperature: float) -> Tensor:
    """Return log softmax(z / T) in fp32."""
    if temperature != 1:
        logits_NV = logits_NV.float() / temperature
    return logits_NV.log_softmax(-1, dtype=torch.float32)


class _ChunkedLoss(torch.autograd.Function):
    """Runs the heads chunk by chunk and accumulates the gradients during the forward pass.

    The heads' weights are read and their modules are not called: in a sharded model the weights are
    gathered from the final norm until the end of the forward pass.
    """

    @staticmethod
    def forward(
        ctx,
        weights_and_temperature: tuple[float, float, float],
        logit_change: LogitChange,
        targets_N: Tensor,
        teacher_hidden_ND: Tensor | None,
        teacher_head: nn.Linear | None,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        student = _Head(hidden_ND, weight_VD, bias_V, dtype)
        teacher = None
        if teacher_head is not None:
            teacher = _Head(teacher_hidden_ND, teacher_head.weight, teacher_head.bias, dtype)

        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[-3:]
        fp32 = {"dtype": torch.float32}
        hidden_gradient_ND = torch.zeros_like(hidden_ND) if needs_hidden else None
        weight_gradient_VD = torch.zeros_like(weight_VD, **fp32) if needs_weight else None
        bias_gradient_V = torch.zeros_like(bias_V, **fp32) if needs_bias else None
        sums = hidden_ND.new_zeros(2, **fp32)
        softmax_logits = CPU_SOFTMAX_LOGITS if device == "cpu" else CHUNK_LOGITS
        with torch.autocast(device, enabled=False):
            for chunk in slices(len(hidden_ND), CHUNK_LOGITS // len(weight_VD)):
                logits_NV, chunk_targets_N = student.logits(chunk), targets_N[chunk]
                logit_change.apply_(logits_NV)
                teacher_logits_NV = None
                if teacher is not None:
                    teacher_logits_NV = logit_change.apply_(teacher.logits(chunk))
                for rows in slices(len(logits_NV), softmax_logits // len(weight_VD)):
                    *values, gradient_NV = sums_and_gradient(
                        logits_NV[rows],
                        None if teacher_logits_NV is None else teacher_logits_NV[rows],
                        chunk_targets_N[rows],
                        *weights_and_temperature,
                    )
                    sums += torch.stack(values)
                    logit_change.backward_(gradient_NV, logits_NV[rows])
                    logits_NV[rows] = gradient_NV  # from here on it holds the gradient
                if needs_hidden:
                    hidden_gradient_ND[chunk] = logits_NV @ student.weight_VD
                if needs_weight:
                    _add_product(weight_gradient_VD, logits_NV.T, student.hidden_ND[chunk])
                if needs_bias:
                    bias_gradient_V += logits_NV.sum(0, dtype=torch.float32)
        ctx.gradients = [hidden_gradient_ND, weight_gradient_VD, bias_gradient_V]
        cross_entropy, kl = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, kl)
        cross_entropy_weight, kl_weight, _ = weights_and_temperature
        return cross_entropy_weight * cross_entropy + kl_weight * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and released, so that the gradient of a large head is never copied.
        gradients, ctx.gradients = ctx.gradients, None
        return (None,) * 5 + tuple(
            None if gradient is None else gradient.mul_(loss_gradient) for gradient in gradients
        )


class _Head:
    """A projection to the vocabulary with the states it reads, in the dtype of their product."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.hidden_ND, self.weight_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(dtype)

    def logits(self, chunk: slice) -> Tensor:
        return nn.functional.linear(self.hidden_ND[chunk], self.weight_VD, self.bias_V)


def _add_product(total_VD: Tensor, a_VN: Tensor, b_ND: Tensor) -> None:
    """Compute `total += a @ b` in place. The total stays in fp32 whatever the factors' dtype."""
    if a_VN.dtype == total_VD.dtype:
        total_VD.addmm_(a_VN, b_ND)
    else:
        total_VD += a_VN @ b_ND
