"""Cross entropy and Kullback-Leibler divergence over a large vocabulary, chunk by chunk of tokens.

Logits of a whole batch are by far its largest tensors (151,936 entries a token for Qwen3). Here
they exist for a chunk of tokens at a time: the gradient of each chunk is formed at once and only
its sum is kept.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK_LOGITS = 2**25
"""Entries of the logits that exist at once, per model."""


class VocabularyLoss(NamedTuple):
    loss: Tensor
    """Weighted sum of both terms, the one to differentiate."""
    cross_entropy: Tensor
    """Sum over tokens of -log p_student(target), in nats; detached."""
    kl: Tensor
    """Sum over tokens of KL(teacher || student) at the temperature, in nats; detached."""


def vocabulary_loss(
    student_hidden_ND: Tensor,
    student_head: nn.Module,
    targets_N: Tensor,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: nn.Module | None = None,
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
    Softmaxes are taken in fp32.
    """
    if kl_weight and (teacher_hidden_ND is None or teacher_head is None):
        raise ValueError("the KL term needs the teacher's hidden states and head")
    with_gradient = torch.is_grad_enabled()

    def chunk_terms(logits_NV: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both sums of a chunk and the gradient of its loss with respect to the logits."""
        zero = logits_NV.new_zeros((), dtype=torch.float32)
        cross_entropy, kl, gradient_NV = zero, zero, None
        if cross_entropy_weight:
            log_p_NV = logits_NV.float().log_softmax(-1)
            index_N1 = targets_N[chunk, None]
            cross_entropy = -log_p_NV.gather(-1, index_N1).sum()
            if with_gradient:
                gradient_NV = log_p_NV.exp_().mul_(cross_entropy_weight)
                gradient_NV.scatter_add_(
                    -1, index_N1, gradient_NV.new_full(index_N1.shape, -cross_entropy_weight)
                )
        if kl_weight:
            teacher_logits_NV = teacher_head(teacher_hidden_ND[chunk])
            log_q_NV = teacher_logits_NV.float().div_(temperature).log_softmax(-1)
            q_NV = log_q_NV.exp()
            student_log_q_NV = (logits_NV.float() / temperature).log_softmax(-1)
            kl = (q_NV * log_q_NV.sub_(student_log_q_NV)).sum()
            if with_gradient:
                kl_gradient_NV = student_log_q_NV.exp_().sub_(q_NV).mul_(kl_weight / temperature)
                gradient_NV = (
                    kl_gradient_NV if gradient_NV is None else gradient_NV.add_(kl_gradient_NV)
                )
        return cross_entropy, kl, gradient_NV

    parameters = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    return VocabularyLoss(
        *_Chunked.apply(
            student_head,
            chunk_terms,
            cross_entropy_weight,
            kl_weight,
            student_hidden_ND,
            *parameters,
        )
    )


class _Chunked(torch.autograd.Function):
    """Runs the head over chunks of tokens, forming each chunk's gradient while its logits are
    there.
    """

    @staticmethod
    def forward(
        ctx,
        head: nn.Module,
        chunk_terms: Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor | None]],
        cross_entropy_weight: float,
        kl_weight: float,
        hidden_ND: Tensor,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens = len(hidden_ND)
        sums = hidden_ND.new_zeros(2, dtype=torch.float32)
        hidden_gradient_ND = torch.zeros_like(hidden_ND)
        parameter_gradients = [torch.zeros_like(parameter) for parameter in parameters]
        vocab_size = next(head.parameters()).shape[0]
        chunk_tokens = max(1, CHUNK_LOGITS // vocab_size)
        for start in range(0, num_tokens, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, num_tokens))
            with torch.enable_grad():
                chunk_hidden_ND = hidden_ND[chunk].detach().requires_grad_()
                logits_NV = head(chunk_hidden_ND)
            cross_entropy, kl, gradient_NV = chunk_terms(logits_NV.detach(), chunk)
            sums += torch.stack((cross_entropy, kl))
            if gradient_NV is not None:
                hidden_gradient, *gradients = torch.autograd.grad(
                    logits_NV, [chunk_hidden_ND, *parameters], gradient_NV.to(logits_NV.dtype)
                )
                hidden_gradient_ND[chunk] = hidden_gradient
                for total, gradient in zip(parameter_gradients, gradients):
                    total += gradient
        ctx.save_for_backward(hidden_gradient_ND, *parameter_gradients)
        cross_entropy, kl = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy_weight * cross_entropy + kl_weight * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None,) * 4 + tuple(gradient * loss_gradient for gradient in ctx.saved_tensors)
