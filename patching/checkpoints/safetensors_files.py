"""Safetensors files as bytes: read and write headers, and copy byte ranges in the kernel.

A file consists of eight bytes (the length of the header, little-endian), a JSON header, and the
tensors' bytes without holes.
"""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from patching.files.lfs import check_not_a_pointer

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Every reader of the format refuses longer headers."""

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element, by the format's names of dtypes."""

OTHER_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
"""Bits per element of the format's other dtypes. Tensors of these are read over, never copied."""

METADATA = {"format": "pt"}
"""transformers refuses a file without it."""


class StoredTensor(NamedTuple):
    """A tensor as a header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


MOST_DIMENSIONS = 16
LARGEST_NUMBER = 2**63
"""Limits of what a header says, so that products of it are quickly known."""


class TensorOnDisk(NamedTuple):
    """A tensor and the half-open byte range of a file that holds its data."""

    tensor: StoredTensor
    path: Path
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorOnDisk]:
    """Return the tensors of a file by name. Their dtypes may be among OTHER_BITS.

    Raises ValueError if the file is damaged: its header is invalid, or offsets are outside the
    file, overlap, leave holes, or disagree with shape and dtype.
    """
    try:
        return _read_header(path)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        check_not_a_pointer(path)
        raise ValueError(f"{path} is damaged: {error}; download or save it again") from error


def _read_header(path: Path) -> dict[str, TensorOnDisk]:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        available = num_bytes - LENGTH_BYTES
        if not 2 <= length <= min(available, MAX_HEADER_BYTES):
            raise ValueError(
                f"it has {num_bytes} bytes and says that its header takes {length} of them"
            )
        text = file.read(length).decode("utf-8")
    header = json.loads(text, object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = LENGTH_BYTES + length
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = OTHER_BITS.get(dtype) or 8 * ITEM_BYTES.get(dtype, 0)
        if not bits:
            raise ValueError(f"{name} has the unknown dtype {dtype}")
        numbers = (*shape, start, stop)
        if len(shape) > MOST_DIMENSIONS or not all(
            type(number) is int and 0 <= number <= LARGEST_NUMBER for number in numbers
        ):
            raise ValueError(f"{name} has an invalid shape or invalid offsets")
        tensor = StoredTensor(name, dtype, tuple(shape))
        if 8 * (stop - start) != tensor.num_elements * bits:
            raise ValueError(
                f"{name} takes {stop - start} bytes, but by its shape and dtype "
                f"{tensor.num_elements * bits / 8:g}"
            )
        tensors[name] = TensorOnDisk(tensor, path, data_start + start, data_start + stop)
    end = data_start
    for on_disk in sorted(tensors.values(), key=lambda on_disk: (on_disk.start, on_disk.stop)):
        if on_disk.start != end:
            raise ValueError(f"{on_disk.tensor.name} overlaps another tensor or leaves a hole")
        end = on_disk.stop
    if end != num_bytes:
        raise ValueError(f"it has {num_bytes} bytes, but its header describes {end}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("its header has a duplicate key")
    return values


def header_of(tensors: Iterable[StoredTensor]) -> bytes:
    """Return the bytes of a file with these tensors that come before the tensors' data."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # aligns the tensors
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


NOT_OFFERED = {
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
}
"""Errors that mean the kernel or the file system cannot copy this way between two files."""

PIECE_BYTES = 2**17
"""Bytes copied at once. Larger pieces are slower, because the system then looks for larger ranges
of free memory to cache the target in.
"""


def copy_bytes(source: int, target: int, start: int, stop: int) -> None:
    """Append bytes start..stop of one open file to another, both given as file descriptors.

    Raises OSError if the source ends early or the target cannot be written.
    """
    start = _copy_in_kernel(source, target, start, stop)
    while start < stop:
        piece = os.pread(source, min(stop - start, PIECE_BYTES), start)
        if not piece:
            raise OSError("a weights file became shorter while it was copied")
        write_all(target, piece)
        start += len(piece)


def _copy_in_kernel(source: int, target: int, start: int, stop: int) -> int:
    """Copy as much as the kernel can and return where it stopped.

    The copy goes through a pipe that holds pages of the source. copy_file_range does the same with
    half as many pages at a time, and is slower if the two files are aligned differently.
    """
    if not hasattr(os, "splice"):  # this operating system lacks the call
        return start
    outlet, inlet = os.pipe()
    try:
        with suppress(OSError):  # a smaller pipe works too
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIECE_BYTES)
        while waiting := os.splice(source, inlet, min(stop - start, PIECE_BYTES), offset_src=start):
            while waiting:
                written = os.splice(outlet, target, waiting)
                waiting -= written
                start += written
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(outlet)
        os.close(inlet)
    return start


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write all data, in as many calls as the system needs."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def read_exactly(source: int, start: int, num_bytes: int) -> bytearray:
    """Return bytes of an open file. Raises OSError if it ends before."""
    piece = bytearray()
    while len(piece) < num_bytes:
        read = os.pread(source, num_bytes - len(piece), start + len(piece))
        if not read:
            raise OSError("a weights file became shorter while it was copied")
        piece += read
    return piece
