"""Stop a run whose numbers are no longer finite, before they reach weights, files or figures."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Diverged(Exception):
    """A loss, a gradient, a metric or a weight is not finite."""


def check_step(
    step: int,
    loss: Tensor,
    grad_norm: Tensor,
    may_overflow: bool,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Raise Diverged on every rank if the loss of any rank or the norm of the gradients is not
    finite. Called before the optimizer uses the gradients of `step`.

    With `may_overflow` (fp16) only the loss counts: a gradient scaler skips steps that overflow.
    """
    norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    is_bad = ~torch.isfinite(loss)
    if not may_overflow:
        is_bad = is_bad | ~torch.isfinite(norm).to(loss.device)
    if sum_over_ranks(is_bad.float()).item():
        raise Diverged(
            f"step {step}: the loss or its gradients are not finite (on this rank the loss is "
            f"{loss.item():g}, the gradient norm is {norm.item():g})"
        )


def check_metrics(step: int, metrics: dict[str, float]) -> None:
    """Raise Diverged if a held-out metric is not finite."""
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"step {step}: on held-out text, {', '.join(bad)}")


def check_weights(step: int, tensors: dict[str, Tensor]) -> None:
    """Raise Diverged if a weight is not finite."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise Diverged(
            f"step {step}: the weights are not finite, {bad[0]} among {len(bad)} tensors"
        )
