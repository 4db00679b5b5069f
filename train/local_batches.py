"""Micro-batches of local rows that do not depend on the number of ranks.

Each pass has an order of rows. It is cut into micro-batches, which are dealt to the ranks in turn.
At the end of a pass some ranks may be left without rows. They take part in the step, which sharded
models need, with a micro-batch that counts no token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from train.batches import Batch, collate, placeholder
from train.data import Share
from train.training_args import DistillationArguments


class RankBatches(Sampler[list[int]]):
    """Row numbers of one rank's micro-batches. `order` returns all row numbers of a pass."""

    def __init__(
        self, order: Callable[[int], Tensor], num_rows: int, batch_size: int, share: Share
    ) -> None:
        self._order, self._num_rows = order, num_rows
        self._batch_size, self._share = batch_size, share
        self._pass = 0

    def set_epoch(self, epoch: int) -> None:
        self._pass = epoch

    def __len__(self) -> int:
        return -(-self._num_rows // (self._batch_size * self._share.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order, size = self._order(self._pass), self._batch_size
        first, stride = self._share.rank * size, self._share.world_size * size
        for start in range(first, first + len(self) * stride, stride):
            yield order[start : start + size].tolist()


class LocalLoader(DataLoader):
    """Loads one rank's micro-batches. Trainer says which pass it is, and skips on resuming."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def local_loader(rows: Dataset, args: DistillationArguments, share: Share) -> LocalLoader:
    """Return the micro-batches of a rank, in the order that `--train_sampling_strategy` names."""
    batch_size = args.per_device_train_batch_size
    batches = RankBatches(order_of(rows, args, share.world_size), len(rows), batch_size, share)

    def collate_or_take_part(of_batch: list[dict[str, Any]]) -> Batch:
        return collate(of_batch) if of_batch else placeholder()

    return LocalLoader(rows, batch_sampler=batches, collate_fn=collate_or_take_part)


def order_of(
    rows: Dataset, args: DistillationArguments, world_size: int
) -> Callable[[int], Tensor]:
    """Return a function from the number of a pass to its order of rows."""
    strategy = args.train_sampling_strategy
    if strategy == "sequential":
        return lambda _: torch.arange(len(rows))

    def generator(of_pass: int) -> torch.Generator:
        return torch.Generator().manual_seed(args.text_seed + of_pass)

    if strategy == "group_by_length":
        lengths = [len(ids) for ids in rows["input_ids"]]
        size = rows_per_step(args, world_size)
        return lambda of_pass: torch.tensor(
            [*LengthGroupedSampler(size, lengths=lengths, generator=generator(of_pass))]
        )
    return lambda of_pass: torch.randperm(len(rows), generator=generator(of_pass))


def rows_per_step(args: DistillationArguments, world_size: int) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size


def check_enough_rows(rows: Dataset, args: DistillationArguments, max_length: int) -> str | None:
    """Return a line to print if the text is smaller than a step and the run counts passes.

    Raises ValueError if it counts steps: they would be smaller than asked for.
    """
    num_rows, wanted = len(rows), rows_per_step(args, args.world_size)
    if num_rows >= wanted:
        return None
    found = (
        f"the text makes {num_rows:,} rows of up to {max_length} tokens, a step takes {wanted:,}"
    )
    if args.max_steps > 0:
        raise ValueError(
            f"{found}: lower --gradient_accumulation_steps, or give --num_train_epochs to take "
            "smaller steps, one per pass over the text"
        )
    return f"{found}: each pass over the text is one smaller step"
