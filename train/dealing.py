"""Rows that one rank has read, dealt to all ranks at the start of a step.

Micro-batches are dealt in turn, so the rows of a step do not depend on the number of ranks. Each
rank waits for its rows with an idle device. So rows are encoded before, by the thread that reads
them, and each rank decodes its own part alone.
"""

from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.distributed import broadcast

from train.data import ROW_COLUMNS, Share
from train.ranks import FirstRankFailed
from train.stream import Row

DealtRow = dict[str, numpy.ndarray]
"""A row whose columns are arrays."""
FAILED = -1
"""Sent in place of where parts end if the first rank could not read."""


class Parts(NamedTuple):
    """The rows of a step as int32 numbers, one rank's part after the other."""

    numbers: Tensor
    ends: list[int]


def deal(parts: Parts | None, share: Share, device: torch.device) -> list[list[DealtRow]]:
    """Return this rank's micro-batches of a step, of which only the first rank has to give the
    parts. If it gives None, because it cannot read on, the others raise FirstRankFailed.
    """
    is_first, num_ranks = share.rank == 0, share.world_size
    given = parts if is_first else None
    ends = torch.tensor([FAILED] * num_ranks if given is None else given.ends, device=device)
    broadcast(ends, src=0)
    stops = ends.tolist()
    if FAILED in stops:
        if not is_first:
            raise FirstRankFailed(
                "the first rank cannot read the stream any further, see its error"
            )
        return []
    if given is None:
        numbers = torch.empty(stops[-1], dtype=torch.int32, device=device)
    else:
        numbers = given.numbers.to(device)
    broadcast(numbers, src=0)
    start, stop = [0, *stops][share.rank : share.rank + 2]
    return decode(numbers[start:stop].cpu().numpy())


def encode(batches: list[list[Row]], num_ranks: int) -> Parts:
    """Return the parts of all ranks, which take as many micro-batches each. The last ones may be
    empty.

    A micro-batch is its number of rows and a sum of powers of two for their columns, then the
    columns of each row, each after its length.
    """
    batches = batches + [[]] * (-len(batches) % num_ranks)
    numbers, ends = [], [0]
    for rank in range(num_ranks):
        columns: list[list[int]] = []
        for rows in batches[rank::num_ranks]:
            names = [name for name in ROW_COLUMNS if rows and name in rows[0]]
            columns.append([len(rows), sum(1 << ROW_COLUMNS.index(name) for name in names)])
            for row in rows:
                for name in names:
                    columns += [[len(row[name])], row[name]]
        part = [numpy.asarray(column, dtype=numpy.int32) for column in columns]
        numbers += part
        ends.append(ends[-1] + sum(map(len, part)))
    return Parts(torch.from_numpy(numpy.concatenate(numbers)), ends[1:])


def decode(numbers: numpy.ndarray) -> list[list[DealtRow]]:
    """Return the micro-batches of one rank's part, whose columns are views of it."""
    batches, end = [], 0

    def take(length: int) -> numpy.ndarray:
        nonlocal end
        end += length
        return numbers[end - length : end]

    while end < len(numbers):
        num_rows, columns = take(2).tolist()
        names = [name for i, name in enumerate(ROW_COLUMNS) if columns >> i & 1]
        batches.append([{name: take(int(take(1)[0])) for name in names} for _ in range(num_rows)])
    return batches
