"""How many rows a step takes, and how a rank's rows are split into micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.training_args import DistillationArguments

DEFAULT_ROWS, DEFAULT_MICRO_BATCHES = 2, 256
"""Rows per micro-batch, and micro-batches per step and rank: the paper's on 4 ranks."""


def batch_problems(args: DistillationArguments) -> list[str]:
    """Return problems with the flags that set the batch, as they were given."""
    of_all = [name for name in ("global_batch_tokens", "global_batch_rows") if getattr(args, name)]
    of_rank = [
        name
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if getattr(args, name) is not None
    ]
    if len(of_all) == 2 or (of_all and of_rank):
        given = " and ".join(f"--{name}" for name in of_all + of_rank)
        return [f"{given} all set the rows of a step: give --{of_all[0]} alone"]
    return []


def split_global_batch(args: DistillationArguments, max_length: int, num_ranks: int) -> None:
    """Set the rows per micro-batch and the micro-batches per step and rank, in place, so that a
    step has the rows or tokens asked for.

    Raises ValueError if they do not divide into rows of `max_length` tokens, or over the ranks.
    """
    rows = args.global_batch_rows
    if args.global_batch_tokens is not None:
        rows, rest = divmod(args.global_batch_tokens, max_length)
        if rest or not rows:
            fitting = sorted({max(1, rows) * max_length, (rows + 1) * max_length})
            raise ValueError(
                f"global_batch_tokens={args.global_batch_tokens}: not a whole number of rows of "
                f"--max_length {max_length}, choose {' or '.join(map(str, fitting))}"
            )
    if rows is None:
        return
    of_rank, rest = divmod(rows, num_ranks)
    if rest:
        raise ValueError(
            f"a step of {rows} rows (--global_batch_tokens or --global_batch_rows) does not divide "
            f"over {num_ranks} ranks, choose a multiple of {num_ranks} rows"
        )
    size = max(size for size in range(1, DEFAULT_ROWS + 1) if of_rank % size == 0)
    args.per_device_train_batch_size = size
    args.gradient_accumulation_steps = of_rank // size
