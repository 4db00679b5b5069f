"""Cross entropy and Kullback-Leibler divergence over a large vocabulary, in chunks of tokens.

The logits of a whole batch would be by far its largest tensors (151,936 entries per token for
Qwen3). Here they exist for one chunk of tokens at a time: the gradient of each chunk overwrites its
logits, and only its contribution to the gradients of the hidden states and the head is kept.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patching.running.chunks import (
    CHUNK_LOGITS,
    CPU_SOFTMAX_LOGITS,
    CPU_TOP_TOKEN_LOGITS,
    CUDA_CHUNK_LOGITS,
    even_slices,
    slices,
)
from patching.running.logits import UNCHANGED, LogitChange
from train.fused import fused


class VocabularyLoss(NamedTuple):
    loss: Tensor
    """Weighted sum of both terms, the one to differentiate."""
    cross_entropy: Tensor
    """Sum over tokens of -log p_student(target), in nats; detached."""
    kl: Tensor
    """Sum over tokens of KL(teacher || student) at the temperature, in nats; detached."""


class TopTokens(NamedTuple):
    """A teacher's prediction as its most probable tokens, and all others together."""

    ids: Tensor
    """(..., K) token ids, different for each K."""
    log_q: Tensor
    """(..., K) their log-probabilities at the temperature."""
    log_rest: Tensor
    """(...) the logarithm of the probability of all other tokens."""

    def packed(self) -> list[Tensor]:
        """Return tensors of integers with the same bits, which no mixed precision rounds."""
        return [self.ids, self.log_q.view(torch.int16), self.log_rest.view(torch.int32)]

    @classmethod
    def unpacked(cls, packed: list[Tensor]) -> "TopTokens":
        ids, log_q, log_rest = packed
        return cls(ids, log_q.view(torch.float16), log_rest.view(torch.float32))

    def at(self, index: slice) -> "TopTokens":
        return TopTokens(*(values[index] for values in self))


def vocabulary_loss(
    student_hidden_ND: Tensor,
    student_head: nn.Linear,
    targets_N: Tensor,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    teacher_top: TopTokens | None = None,
    *,
    cross_entropy_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
    logit_change: LogitChange = UNCHANGED,
    compile_backend: str | None = None,
) -> VocabularyLoss:
    """Return the sums over tokens of CE(z_S, y) and KL(softmax(z_T / T) || softmax(z_S / T)).

    `loss` is `cross_entropy_weight * cross_entropy + kl_weight * kl`. The factor T^2 of Hinton et
    al. (arXiv 1503.02531) belongs in `kl_weight`. A term of weight 0 is not computed and its sum is
    0. Gradients reach `student_hidden_ND` and the parameters of `student_head`, never the teacher.
    Softmaxes are computed in fp32. `logit_change` is what both models do to the output of their
    heads. With `teacher_top` in place of the teacher's states and head, the KL is between its K + 1
    events. Tokens with a negative target count for nothing. With `compile_backend`, the elementwise
    passes over logits are compiled. The loss can be differentiated only once.

    Raises ValueError if `kl_weight` is not 0 and the teacher's states or head are missing.
    """
    has_states = teacher_hidden_ND is not None and teacher_head is not None
    if kl_weight and teacher_top is None and not has_states:
        raise ValueError("the KL term needs the teacher's hidden states and head")
    return VocabularyLoss(
        *_ChunkedLoss.apply(
            (cross_entropy_weight, kl_weight, temperature),
            logit_change,
            compile_backend,
            targets_N,
            teacher_hidden_ND,
            teacher_head if kl_weight else None,
            teacher_top if kl_weight else None,
            student_hidden_ND,
            student_head.weight,
            student_head.bias,
        )
    )


def _replace_by_gradient_(
    logits_NV: Tensor,
    teacher: Tensor | TopTokens | None,
    targets_N: Tensor,
    weights_and_temperature: tuple[float, float, float],
    logit_change: LogitChange = UNCHANGED,
) -> Tensor:
    """Return both sums over some tokens, and overwrite the student's logits by the gradient of
    their weighted sum. Rows with a negative target count for nothing.

    `teacher` is its logits, which are overwritten too, or its most probable tokens. Each logit is
    exponentiated once: p is the exponentials over their sum, and log p = z - log-sum-exp(z).
    """
    cross_entropy_weight, kl_weight, temperature = weights_and_temperature
    is_target_N1, targets_N1 = (targets_N >= 0)[:, None], targets_N.clamp_min(0)[:, None]
    z_NV = logits_NV.to(torch.float32, copy=True)
    z_target_N1 = z_NV.gather(-1, targets_N1)
    apart_NK = None
    if isinstance(teacher, TopTokens):
        tempered_z_NV = z_NV if temperature == 1 else z_NV / temperature
        ids_NK = teacher.ids.long()
        top_z_NK = tempered_z_NV.gather(-1, ids_NK)
        apart_NK = ids_NK if temperature == 1 else None
    elif kl_weight:
        teacher_z_NV = teacher.float()
        tempered_z_NV = z_NV
        if temperature != 1:
            teacher_z_NV, tempered_z_NV = teacher_z_NV.div_(temperature), z_NV / temperature
        difference_NV = teacher_z_NV - tempered_z_NV
        q_NV, q_sum_N1, q_log_sum_N1, *_ = _exponentials_(teacher_z_NV)

    of_student = _exponentials_(z_NV, apart_NK)
    p_NV, p_sum_N1, p_log_sum_N1, *_ = of_student
    cross_entropy = ((p_log_sum_N1 - z_target_N1) * is_target_N1).sum()
    scale_N1 = is_target_N1 / p_sum_N1
    if not kl_weight:
        kl = torch.zeros_like(cross_entropy)
        gradient_NV = p_NV.mul_(scale_N1 * cross_entropy_weight)
    elif isinstance(teacher, TopTokens):
        exp_scale_N1 = scale_N1 * cross_entropy_weight
        kl_scale_N1 = is_target_N1 * (kl_weight / temperature)
        if temperature == 1:
            gradient_NV = p_NV
            kl_N1 = _replace_by_top_gradient_(
                of_student, ids_NK, top_z_NK, teacher, exp_scale_N1, kl_scale_N1
            )
        else:
            tempered = _exponentials_(tempered_z_NV, ids_NK)
            kl_N1 = _replace_by_top_gradient_(tempered, ids_NK, top_z_NK, teacher, 0.0, kl_scale_N1)
            gradient_NV = tempered.exp_NV.addcmul_(p_NV, exp_scale_N1)
        kl = (kl_N1 * is_target_N1).sum()
    else:
        weight = kl_weight / temperature
        if temperature == 1:
            log_sum_N1 = p_log_sum_N1
            gradient_NV = p_NV.mul_(scale_N1 * (cross_entropy_weight + weight))
        else:
            tempered_p_NV, sum_N1, log_sum_N1, *_ = _exponentials_(tempered_z_NV)
            gradient_NV = p_NV.mul_(scale_N1 * cross_entropy_weight)
            gradient_NV.addcmul_(tempered_p_NV, weight * is_target_N1 / sum_N1)
        kl_N1 = difference_NV.mul_(q_NV).sum(-1, keepdim=True) / q_sum_N1
        kl = ((kl_N1 - q_log_sum_N1 + log_sum_N1) * is_target_N1).sum()
        gradient_NV.addcmul_(q_NV, -weight * is_target_N1 / q_sum_N1)
    gradient_NV.scatter_add_(-1, targets_N1, -cross_entropy_weight * is_target_N1.float())
    logits_NV.copy_(logit_change.backward_(gradient_NV, logits_NV))
    return torch.stack((cross_entropy * bool(cross_entropy_weight), kl))


class _Exponentials(NamedTuple):
    """exp(z - max z) of logits z, and what a softmax needs of them."""

    exp_NV: Tensor
    """0 at tokens that are kept apart."""
    sum_N1: Tensor
    log_sum_N1: Tensor
    """The logarithm of the sum of exp(z)."""
    apart_NK: Tensor | None
    """The exponentials of the tokens that are kept apart."""
    rest_N1: Tensor
    """The sum of all others, which would be lost in the difference of the sums."""


def _exponentials_(z_NV: Tensor, apart_ids_NK: Tensor | None = None) -> _Exponentials:
    """Replace the logits z by their exponentials, and return these."""
    max_N1 = z_NV.amax(-1, keepdim=True)
    exp_NV = z_NV.sub_(max_N1).exp_()
    apart_NK = None
    if apart_ids_NK is not None:
        apart_NK = exp_NV.gather(-1, apart_ids_NK)
        exp_NV.scatter_(-1, apart_ids_NK, 0.0)
    sum_N1 = rest_N1 = exp_NV.sum(-1, keepdim=True)
    if apart_NK is not None:
        sum_N1 = rest_N1 + apart_NK.sum(-1, keepdim=True)
    return _Exponentials(exp_NV, sum_N1, max_N1 + sum_N1.log(), apart_NK, rest_N1)


def _replace_by_top_gradient_(
    exponentials: _Exponentials,
    ids_NK: Tensor,
    z_NK: Tensor,
    teacher: TopTokens,
    exp_scale_N1: Tensor | float,
    kl_scale_N1: Tensor,
) -> Tensor:
    """Return the KL (N, 1) between the events "token k" for each of the teacher's top tokens and
    "any other token". Overwrite e, the exponentials of the logits z with the top tokens apart, by
    the gradient `exp_scale e + kl_scale dKL/dz`. `z_NK` are the logits of the top tokens.
    """
    exp_NV, sum_N1, log_sum_N1, exp_NK, rest_N1 = exponentials
    log_q_NK, log_rest_q_N1 = teacher.log_q.float(), teacher.log_rest[:, None]
    q_NK, log_p_NK = log_q_NK.exp(), z_NK - log_sum_N1
    rest_N1 = rest_N1.clamp_min(torch.finfo(torch.float32).tiny)
    log_rest_p_N1, rest_q_N1 = (rest_N1 / sum_N1).log(), log_rest_q_N1.exp()
    # dKL/dz is p (1 - q(rest) / p(rest)) at other tokens, and p - q at the top tokens.
    exp_NV.mul_(exp_scale_N1 + kl_scale_N1 * (1 / sum_N1 - rest_q_N1 / rest_N1))
    top_NK = exp_scale_N1 * exp_NK + kl_scale_N1 * (log_p_NK.exp() - q_NK)
    exp_NV.scatter_(-1, ids_NK, top_NK)
    kl_N1 = (q_NK * (log_q_NK - log_p_NK)).sum(-1, keepdim=True)
    return kl_N1 + rest_q_N1 * (log_rest_q_N1 - log_rest_p_N1)


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
        compile_backend: str | None,
        targets_N: Tensor,
        teacher_hidden_ND: Tensor | None,
        teacher_head: nn.Linear | None,
        teacher_top: TopTokens | None,
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
        chunk_logits = CUDA_CHUNK_LOGITS if device == "cuda" else CHUNK_LOGITS
        softmax_logits = CHUNK_LOGITS
        if device == "cpu":
            softmax_logits = CPU_SOFTMAX_LOGITS if teacher_top is None else CPU_TOP_TOKEN_LOGITS
        replace_by_gradient_ = fused(_replace_by_gradient_, compile_backend)
        with torch.autocast(device, enabled=False):
            for chunk in even_slices(len(hidden_ND), chunk_logits // len(weight_VD)):
                logits_NV, chunk_targets_N = student.logits(chunk), targets_N[chunk]
                logit_change.apply_(logits_NV)
                teacher_logits_NV = None
                if teacher is not None:
                    teacher_logits_NV = logit_change.apply_(teacher.logits(chunk))
                at_once = softmax_logits // len(weight_VD)
                if compile_backend is not None:  # fused kernels keep no fp32 copies
                    at_once = len(logits_NV)
                for rows in slices(len(logits_NV), at_once):
                    of_teacher = None
                    if teacher_top is not None:
                        of_teacher = teacher_top.at(chunk).at(rows)
                    elif teacher_logits_NV is not None:
                        of_teacher = teacher_logits_NV[rows]
                    sums += replace_by_gradient_(
                        logits_NV[rows],
                        of_teacher,
                        chunk_targets_N[rows],
                        weights_and_temperature,
                        logit_change,
                    )
                if needs_hidden:
                    hidden_gradient_ND[chunk] = logits_NV @ student.weight_VD
                if needs_weight:
                    student.add_weight_gradient(weight_gradient_VD, logits_NV, chunk)
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
        return (None,) * 7 + tuple(
            None if gradient is None else gradient.mul_(loss_gradient) for gradient in gradients
        )


class _Head:
    """A projection to the vocabulary with the states it reads, in the dtype of their product.

    Products of all chunks are written to the same memory. On a CPU, new memory for each would cost
    as much time as the products themselves.
    """

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.hidden_ND, self.weight_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(dtype)
        self._logits_NV = self._product_VD = None

    def logits(self, chunk: slice) -> Tensor:
        """Return the logits of a chunk, which the next call overwrites."""
        hidden_ND = self.hidden_ND[chunk]
        if self._logits_NV is None:  # the first chunk is the longest
            self._logits_NV = hidden_ND.new_empty(len(hidden_ND), len(self.weight_VD))
        logits_NV = self._logits_NV[: len(hidden_ND)]
        torch.mm(hidden_ND, self.weight_VD.T, out=logits_NV)
        return logits_NV if self.bias_V is None else logits_NV.add_(self.bias_V)

    def add_weight_gradient(self, total_VD: Tensor, gradient_NV: Tensor, chunk: slice) -> None:
        """Add a chunk's gradient of the weight to a total in fp32, whatever the products' dtype."""
        gradient_VN, hidden_ND = gradient_NV.T, self.hidden_ND[chunk]
        if total_VD.dtype == gradient_VN.dtype:
            total_VD.addmm_(gradient_VN, hidden_ND)
            return
        if total_VD.is_cuda and torch.version.hip is None:  # cuBLAS adds to a total in fp32 itself
            fp32 = total_VD.dtype
            torch.addmm(total_VD, gradient_VN, hidden_ND, out_dtype=fp32, out=total_VD)
            return
        if self._product_VD is None:
            self._product_VD = torch.empty_like(self.weight_VD)
        torch.mm(gradient_VN, hidden_ND, out=self._product_VD)
        for rows in slices(len(total_VD), CPU_SOFTMAX_LOGITS // total_VD.shape[1]):
            total_VD[rows] += self._product_VD[rows]
