"""Rows that one rank has read, dealt to all ranks at the start of a step.

Micro-batches are dealt in turn, so the rows of a step do not depend on the number of ranks.
"""

import numpy
import torch
from torch.distributed import broadcast

from train.data import ROW_COLUMNS, Share
from train.stream import Row

FAILED = -1
"""Sent in place of a length if the first rank could not read."""


def deal(batches: list[list[Row]] | None, share: Share, device: torch.device) -> list[list[Row]]:
    """Return this rank's micro-batches of a step, all of which only the first rank has to give. If
    it gives None, because it cannot read on, the others raise RuntimeError.
    """
    if share.world_size == 1:
        return batches or []
    if batches:  # each rank takes as many, the last ones may be empty
        batches = batches + [[]] * (-len(batches) % share.world_size)
    is_first = share.rank == 0
    given = torch.from_numpy(encode(batches)).to(device) if batches else None
    length = torch.tensor(FAILED if given is None else len(given), device=device)
    broadcast(length, src=0)
    if int(length) == FAILED:
        if not is_first:
            raise RuntimeError("the first rank cannot read the stream any further, see its error")
        return []
    numbers = given if is_first else torch.empty(int(length), dtype=torch.int32, device=device)
    broadcast(numbers, src=0)
    return decode(numbers.cpu().numpy())[share.rank :: share.world_size]


def encode(batches: list[list[Row]]) -> numpy.ndarray:
    """Return micro-batches as one array: the number of rows of each micro-batch and a sum of powers
    of two for their columns, then the columns of each row, each after its length.
    """
    parts: list[list[int]] = []
    for rows in batches:
        names = [name for name in ROW_COLUMNS if rows and name in rows[0]]
        parts.append([len(rows), sum(1 << ROW_COLUMNS.index(name) for name in names)])
        for row in rows:
            for name in names:
                parts += [[len(row[name])], row[name]]
    return numpy.concatenate([numpy.asarray(part, dtype=numpy.int32) for part in parts])


def decode(numbers: numpy.ndarray) -> list[list[Row]]:
    """Return the micro-batches that `encode` wrote."""
    batches, end = [], 0

    def take(length: int) -> list[int]:
        nonlocal end
        end += length
        return numbers[end - length : end].tolist()

    while end < len(numbers):
        num_rows, columns = take(2)
        names = [name for i, name in enumerate(ROW_COLUMNS) if columns >> i & 1]
        batches.append([{name: take(*take(1)) for name in names} for _ in range(num_rows)])
    return batches
