"""Cross entropy and Kullback-Leibler divergence over a large vocabulary, chunk by chunk of tokens.

Logits of a whole batch are by far its largest tensors (151,936 entries a token for Qwen3). Here
they exist for a chunk of tokens at a time: the gradient of each chunk takes the place of its
logits, and only what it adds to the gradients of states and head is kept.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patching.running.chunks import CHUNK_LOGITS, CPU_SOFTMAX_LOGITS, slices


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
) -> VocabularyLoss:
    """Sums over tokens of CE(z_S, y) and KL(softmax(z_T / T) || softmax(z_S / T)), differentiable
    in the student.

    `loss` is `cross_entropy_weight * cross_entropy + kl_weight * kl`; the factor T^2 of Hinton et
    al. (arXiv 1503.02531) belongs into `kl_weight`. A term of weight 0 is not computed and its sum
    is 0. Gradients reach `student_hidden_ND` and the head's parameters; the teacher gets none.
    Softmaxes are taken in fp32. The loss can be differentiated once.
    """
    if kl_weight and (teacher_hidden_ND is None or teacher_head is None):
        raise ValueError("the KL term needs the teacher's hidden states and head")

    def terms(logits_NV: Tensor, teacher_logits_NV: Tensor | None, targets_N: Tensor):
        """Both sums over some tokens, and the gradient of their loss in the logits, all in fp32."""
        log_p_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
        cross_entropy = -log_p_NV.gather(-1, targets_N[:, None]).sum() * bool(cross_entropy_weight)
        if not kl_weight:
            gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight)
            kl = torch.zeros_like(cross_entropy)
        else:
            log_q_NV = _at(temperature, teacher_logits_NV).log_softmax(-1, dtype=torch.float32)
            student_log_q_NV = log_p_NV
            if temperature != 1:
                student_log_q_NV = _at(temperature, logits_NV).log_softmax(-1)
            q_NV = log_q_NV.exp()
            kl = log_q_NV.sub_(student_log_q_NV).mul_(q_NV).sum()
            weight = kl_weight / temperature
            if temperature == 1:
                gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight + weight)
            else:
                gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight)
                gradient_NV.add_(student_log_q_NV.exp_(), alpha=weight)
            gradient_NV.sub_(q_NV, alpha=weight)
        gradient_NV.scatter_add_(
            -1,
            targets_N[:, None],
            gradient_NV.new_full((len(targets_N), 1), -cross_entropy_weight),
        )
        return cross_entropy, kl, gradient_NV

    return VocabularyLoss(
        *_Chunked.apply(
            terms,
            (cross_entropy_weight, kl_weight),
            targets_N,
            teacher_hidden_ND,
            teacher_head if kl_weight else None,
            student_hidden_ND,
            student_head.weight,
            student_head.bias,
        )
    )


def _at(temperature: float, logits_NV: Tensor) -> Tensor:
    return logits_NV if temperature == 1 else logits_NV.float() / temperature


class _Chunked(torch.autograd.Function):
    """Runs the head over chunks of tokens, forming each chunk's gradient in place of its logits.

    The head's weight is read, its module is not called: inside a sharded model the weight is whole
    between the final norm and the end of the forward pass.
    """

    @staticmethod
    def forward(
        ctx,
        terms: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor]],
        term_weights: tuple[float, float],
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
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[-3:]
        student = _Projection(hidden_ND, weight_VD, bias_V, dtype)
        teacher = None
        if teacher_head is not None:
            teacher = _Projection(teacher_hidden_ND, teacher_head.weight, teacher_head.bias, dtype)

        sums = hidden_ND.new_zeros(2, dtype=torch.float32)
        hidden_gradient_ND = torch.zeros_like(hidden_ND) if needs_hidden else None
        weight_gradient_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        )
        bias_gradient_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        with torch.autocast(device, enabled=False):
            for chunk in slices(len(hidden_ND), CHUNK_LOGITS // len(weight_VD)):
                logits_NV = student.logits(chunk)
                teacher_logits_NV = None if teacher is None else teacher.logits(chunk)
                chunk_targets_N = targets_N[chunk]
                at_once = CPU_SOFTMAX_LOGITS if device == "cpu" else CHUNK_LOGITS
                for rows in slices(len(logits_NV), at_once // len(weight_VD)):
                    *values, gradient_NV = terms(
                        logits_NV[rows],
                        None if teacher_logits_NV is None else teacher_logits_NV[rows],
                        chunk_targets_N[rows],
                    )
                    sums += torch.stack(values)
                    logits_NV[rows] = gradient_NV
                if needs_hidden:
                    hidden_gradient_ND[chunk] = logits_NV @ student.weight_VD
                if needs_weight:
                    _add_product(weight_gradient_VD, logits_NV.T, student.hidden_ND[chunk])
                if needs_bias:
                    bias_gradient_V += logits_NV.sum(0, dtype=torch.float32)
        ctx.gradients = [hidden_gradient_ND, weight_gradient_VD, bias_gradient_V]
        cross_entropy, kl = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, kl)
        loss = term_weights[0] * cross_entropy + term_weights[1] * kl
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, and let go of: the gradient of a large head is not copied.
        gradients, ctx.gradients = ctx.gradients, None
        return (None,) * 5 + tuple(
            None if gradient is None else gradient.mul_(loss_gradient) for gradient in gradients
        )


class _Projection:
    """A head over the states it reads, both in the dtype of the matrix product."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.hidden_ND, self.weight_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(dtype)

    def logits(self, chunk: slice) -> Tensor:
        return nn.functional.linear(self.hidden_ND[chunk], self.weight_VD, self.bias_V)


def _add_product(total_VD: Tensor, a_VN: Tensor, b_ND: Tensor) -> None:
    """`total += a @ b`; the total stays in fp32 whatever the dtype of the factors."""
    if a_VN.dtype == total_VD.dtype:
        total_VD.addmm_(a_VN, b_ND)
    else:
        total_VD += a_VN @ b_ND
