"""Ranks that wait for one of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import _get_default_store

from train.training_args import DistillationArguments

LONGEST_WAIT = timedelta(days=30)


class FirstRankFailed(RuntimeError):
    """The first rank, which reads for all, cannot read on and has said why."""


@contextmanager
def first_rank_first(args: DistillationArguments, name: str) -> Iterator[None]:
    """Run the block on the first rank of a node, then on its others. `name` is used once per run.

    Others wait at torchrun's key-value store. A barrier would fail after the timeout of the process
    group, and tokenizing may take longer.
    """
    if args.world_size == 1:
        yield
        return
    key = f"{name} of node {os.environ.get('GROUP_RANK', '0')}"
    is_first = args.local_process_index == 0
    if not is_first:
        _get_default_store().wait([key], LONGEST_WAIT)
    yield
    if is_first:
        _get_default_store().set(key, "done")
