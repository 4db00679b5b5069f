"""Held-out rows: the loss and its terms as exact means over all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch import Tensor, nn

from train.batches import Batch, collate, placeholder
from train.data import Share
from train.loss import LossTerms, StepCounts, count
from train.masking import Masking
from train.training_args import DistillationArguments


def held_out_means(
    forward: Callable[[Batch, StepCounts], LossTerms],
    rows: Dataset,
    args: DistillationArguments,
    share: Share,
    masking: Masking | None,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Return the training loss, and the unweighted terms, over all rows.

    `forward` is the distillation forward pass on this rank, and `share` says which rows it takes.
    A rank that has run out of rows takes part with a `placeholder`.
    """
    one = torch.ones((), dtype=torch.long, device=args.device)  # the divisor of sums
    sums = torch.zeros(5, dtype=torch.float64, device=args.device)
    batch_size = args.per_device_eval_batch_size
    for first_row in range(0, len(rows), batch_size * share.world_size):
        first = first_row + share.rank * batch_size
        indices = [i for i in range(first, first + batch_size) if i < len(rows)]
        batch = collate([rows[i] for i in indices]) if indices else placeholder()
        if masking is not None:
            batch = masking.hide_each(batch, first, args.seed)
        terms = forward(batch, StepCounts(one, one))
        counts = count(batch["labels"], is_masked_model=masking is not None)
        values = (terms.cross_entropy, terms.kl, terms.cosine, *counts)
        sums += torch.stack([value.to(args.device, torch.float64) for value in values])
    cross_entropy, kl, cosine, num_targets, num_positions = sum_over_ranks(sums).tolist()
    means = {
        "cross_entropy": cross_entropy / max(num_targets, 1),
        "kl": kl / max(num_targets, 1),
        "cosine": cosine / num_positions,
    }
    weights = args.loss_weights
    loss = (
        weights.cross_entropy * means["cross_entropy"]
        + weights.kl * weights.temperature**2 * means["kl"]
        + weights.cosine * means["cosine"]
    )
    return {"loss": loss} | {name: means[name] for name in weights.for_evaluation().active_terms}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode during the block."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)
