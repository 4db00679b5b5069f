"""How tensors are distributed over weights files, and what the files take, by arithmetic on arrays.

A family of a large mixture of experts has millions of tensors over all its sizes, too many to write
each one's entry in a header just to measure it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from patching.checkpoints.safetensors_files import (
    ITEM_BYTES,
    LENGTH_BYTES,
    StoredTensor,
    header_of,
)

HEADER_BYTES = len(header_of([]))
"""What comes before the data in a file without tensors, padded."""
UNPADDED_BYTES = len(header_of([]).rstrip()) - len("}")
OFFSETS_BYTES = 2 * 20
"""Most digits that two offsets take."""
POWERS_OF_TEN = 10 ** np.arange(1, 19)


class TensorBytes(NamedTuple):
    """What some tensors take in a file, as arrays with one entry per tensor."""

    data: np.ndarray
    entry: np.ndarray
    """Bytes of the tensor's entry in the header, without the digits of its offsets."""
    item: np.ndarray
    """Bytes per number."""

    @classmethod
    def of(cls, tensors: Iterable[StoredTensor]) -> "TensorBytes":
        rows = [(t.num_bytes, entry_bytes(t), ITEM_BYTES[t.dtype]) for t in tensors]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)

    @classmethod
    def joined(cls, groups: Sequence["TensorBytes"]) -> "TensorBytes":
        return cls(*map(np.concatenate, zip(*groups)))

    def with_longer_names(self, num_characters: int) -> "TensorBytes":
        return self._replace(entry=self.entry + num_characters)


def entry_bytes(tensor: StoredTensor) -> int:
    """Return the length of a tensor's entry in a header, with its comma and without the digits of
    its offsets.
    """
    entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": ["", ""]}
    text = json.dumps({tensor.name: entry}, separators=(",", ":"))
    return len(text) - len('{""""}') + len(",")


def file_slices(tensors: TensorBytes, max_shard_bytes: int) -> Iterator[slice]:
    """Cut tensors in sequence into files of at most `max_shard_bytes`. A larger tensor gets its own
    file.
    """
    ends = np.cumsum(tensors.data + tensors.entry + OFFSETS_BYTES)
    room = max_shard_bytes - HEADER_BYTES - LENGTH_BYTES  # for padding
    start, used = 0, 0
    while start < len(ends):
        stop = max(int(np.searchsorted(ends, used + room, side="right")), start + 1)
        yield slice(start, stop)
        start, used = stop, ends[stop - 1]


def bytes_of_files(tensors: TensorBytes, max_shard_bytes: int) -> int:
    """Return the bytes that weights files with these tensors take on disk, headers included."""
    total = 0
    for part in file_slices(tensors, max_shard_bytes):
        data, entry, item = (values[part] for values in tensors)
        data = data[np.argsort(-item, kind="stable")]  # in files the widest dtypes come first
        stops = np.cumsum(data)
        num_digits = np.searchsorted(POWERS_OF_TEN, [stops - data, stops], side="right") + 1
        header = UNPADDED_BYTES + int(entry.sum() + num_digits.sum()) + len("}")
        total += header + -header % LENGTH_BYTES + int(stops[-1])
    return total
