"""Micro-batches: rows padded into tensors, read from a stream, and fetched one step ahead.

Shapes: B rows, T positions.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from patching.files.outputs import write_json
from train.chats.phases import Phases
from train.checkpoints.find import STREAM_FILE_NAME
from train.data import Share
from train.dealing import DealtRow, Parts, deal, encode
from train.loss import IGNORED_LABEL, NO_TARGET, count
from train.stream import Position, Row, Stream

Batch = dict[str, Any]
"""Tensors by name, of shape (B, T), and `teacher_top`, a list of them, if there is a cache, or the
future of one. What is no tensor may tell more, for models that must not wait for an accelerator.
"""


def collate(rows: list[Row] | list[DealtRow]) -> Batch:
    """Return rows as tensors of shape (B, T), padded on the right to the longest row.

    `labels` are the rows' own or else the tokens, with IGNORED_LABEL at padding. Padding is known
    from the lengths and never from a token's id: the end-of-text token often serves as padding but
    is a real target.
    Rows of equal length get no `attention_mask`, so that attention can use its plain causal path.

    Rows with `document_lengths` hold documents that do not see each other: they get `position_ids`
    that start over with each one, padding included, instead of a mask. A document's first token has
    nothing to be predicted from. Rows with `labels` have few targets, which `few_targets` says.
    """
    length = max(len(row["input_ids"]) for row in rows)
    lengths_B1 = torch.tensor([[len(row["input_ids"])] for row in rows])
    input_ids_BT = _padded([row["input_ids"] for row in rows], length)
    mask_BT = torch.arange(length)[None] < lengths_B1
    has_labels = "labels" in rows[0]
    labels_BT = _padded([row["labels"] for row in rows], length) if has_labels else input_ids_BT
    labels_BT = labels_BT.masked_fill(~mask_BT, IGNORED_LABEL)
    batch = {"input_ids": input_ids_BT, "labels": labels_BT}
    if has_labels:
        batch["few_targets"] = True
    if "document_lengths" in rows[0]:
        positions_BT = torch.stack([positions(row["document_lengths"], length) for row in rows])
        batch["labels"] = labels_BT.masked_fill((positions_BT == 0) & (labels_BT >= 0), NO_TARGET)
        batch["position_ids"] = positions_BT
    elif not mask_BT.all():
        batch["attention_mask"] = mask_BT.long()
    return batch


def _padded(values: list[list[int]] | list[numpy.ndarray], length: int) -> Tensor:
    padded_BT = numpy.zeros((len(values), length), dtype=numpy.int64)
    for padded_T, of_row in zip(padded_BT, values):
        padded_T[: len(of_row)] = of_row
    return torch.from_numpy(padded_BT)


def placeholder() -> Batch:
    """Return a micro-batch that counts no token, for a rank that has no row left. Sharded models
    need every rank in every forward pass.
    """
    batch = collate([{"input_ids": [0, 0]}])
    batch["labels"].fill_(IGNORED_LABEL)
    return batch


def positions(document_lengths: list[int] | numpy.ndarray, row_length: int) -> Tensor:
    """Return the position of each token in its document, of shape (T,). Padding is a document."""
    lengths = numpy.append(document_lengths, row_length - sum(document_lengths))
    starts = lengths.cumsum() - lengths
    return torch.from_numpy(numpy.arange(row_length) - starts.repeat(lengths))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a micro-batch of this host on a device, without waiting for what the device computes.
    `num_documents` is counted here, because counting on the device would mean waiting for it.
    """

    def move(values: Any) -> Any:
        if isinstance(values, Future):
            values = values.result()
        if isinstance(values, list):
            return [move(value) for value in values]
        if not isinstance(values, Tensor):
            return values
        if device.type == "cuda":  # from ordinary memory, copies wait
            values = values.pin_memory()
        return values.to(device, non_blocking=True)

    moved = {name: move(values) for name, values in batch.items()}
    if (positions_BT := batch.get("position_ids")) is not None:
        moved["num_documents"] = int((positions_BT == 0).sum())
    return moved


class StreamBatches:
    """The micro-batches of each step, endlessly, of the rows that the first rank reads. Other ranks
    have none.
    """

    def __init__(
        self, rows: Stream | Phases, batch_size: int, num_batches: int, share: Share
    ) -> None:
        """`num_batches` is how many a step takes over all ranks, unless it is one of chats."""
        self._rows, self._batch_size, self._share = rows, batch_size, share
        self._rows_per_step = num_batches * batch_size

    def __iter__(self) -> Iterator[list[list[Row]]]:
        """Raises UnusableText if the stream holds no text."""
        if self._share.rank:
            return
        steps = (
            self._rows.steps(self._rows_per_step)
            if isinstance(self._rows, Phases)
            else _steps(iter(self._rows), self._rows_per_step)
        )
        for rows in steps:
            yield [
                rows[start : start + self._batch_size]
                for start in range(0, len(rows), self._batch_size)
            ]

    @property
    def position(self) -> Position | None:
        """Where the next step begins in the stream, None for its start."""
        return self._rows.position

    def resume(self, position: Position) -> None:
        self._rows.resume(position)


def _steps(rows: Iterator[Row], rows_per_step: int) -> Iterator[list[Row]]:
    while step := list(islice(rows, rows_per_step)):
        yield step


class Cache(Protocol):
    """What `train.teacher_cache.TeacherCache` does here."""

    def add_to(self, batch: Batch) -> Batch: ...

    def check_holds(self, rows: Iterable[Row]) -> None: ...


class StepPrefetcher:
    """The micro-batches of each optimizer step, fetched while the step before is computed.

    A thread fetches, and for a stream tokenizes, one step ahead of training. A checkpoint must
    record where the next step begins in the stream, and not how far the thread has read. With a
    cache, the teacher's predictions are added to the micro-batches.

    The rows of a stream are dealt to several ranks at the start of their step, by the main thread,
    because all ranks must take part in the same order in whatever they do together. The thread then
    adds the predictions while the first micro-batches are computed.
    """

    def __init__(self, share: Share, device: torch.device, cache: Cache | None = None) -> None:
        self._share, self._device, self._cache = share, device, cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="micro-batches")
        self._stream: StreamBatches | None = None
        self._iterator: Iterator | None = None
        self._next: Future[tuple[Any, Position | None]]
        self._positions: dict[int, Position | None] = {}
        """Where the current step and the next one begin in the stream."""

    def read(self, stream: StreamBatches, checkpoint: str | None) -> None:
        """Take micro-batches from a stream, at a checkpoint's position if one is given."""
        if checkpoint is not None:
            saved = Path(checkpoint, STREAM_FILE_NAME).read_text(encoding="utf-8")
            if (position := json.loads(saved)) is not None:
                stream.resume(position)
        self._stream = stream

    def batches(self, step: int, iterator: Iterator, num_batches: int) -> list[Batch]:
        """Return the micro-batches of a step: fewer than `num_batches` at the end of an epoch, and
        as many as it takes in a step of chats.
        """
        if iterator is not self._iterator:
            self._iterator, self._positions = iterator, {step: self._stream_position()}
            self._next = self._thread.submit(self._fetch, iterator, num_batches)
        fetched, next_position = self._result()
        if self._deals:
            mine = deal(fetched, self._share, self._device)
            batches = [collate(rows) if rows else placeholder() for rows in mine]
            fetched = [self._complete_later(batch) for batch in batches]
        self._next = self._thread.submit(self._fetch, iterator, num_batches)
        self._positions = {step: self._positions[step], step + 1: next_position}
        return fetched

    def complete(self, batch: Batch) -> Batch:
        """Add the teacher's predictions to a micro-batch."""
        return batch if self._cache is None else self._cache.add_to(batch)

    def _complete_later(self, batch: Batch) -> Batch:
        if self._cache is None:
            return batch
        complete = self._thread.submit(lambda: self.complete(batch)["teacher_top"])
        return batch | {"teacher_top": complete}

    def save_position(self, checkpoint: Path, step: int) -> None:
        """Write where the micro-batches of `step` begin, which is the last step or the next one.
        Only the first rank reads a stream, and without one there is nothing to write.
        """
        if self._stream is not None and self._share.rank == 0:
            write_json(checkpoint / STREAM_FILE_NAME, self.position_at(step))

    def position_at(self, step: int) -> Position | None:
        """Return where the micro-batches of `step` begin in the stream, which is the last step or
        the next one.
        """
        # A run resumed after its last step has fetched nothing: it is where it was loaded.
        return self._positions.get(step, self._stream_position())

    @property
    def _deals(self) -> bool:
        return self._stream is not None and self._share.world_size > 1

    def _result(self) -> tuple[Any, Position | None]:
        try:
            return self._next.result()
        except Exception:
            if self._deals:
                deal(None, self._share, self._device)  # the other ranks wait for rows
            raise

    def _fetch(
        self, iterator: Iterator, num_batches: int
    ) -> tuple[list[Batch] | Parts | None, Position | None]:
        """Return the micro-batches of a step, or on the first of several ranks what is dealt."""
        if self._stream is None:
            return [self.complete(batch) for batch in islice(iterator, num_batches)], None
        step = next(iterator, [])
        if self._cache is not None:  # where an error reaches all ranks, not where one needs a row
            self._cache.check_holds(row for rows in step for row in rows)
        if not self._deals:
            fetched = [self.complete(collate(rows)) for rows in step]
        else:
            fetched = encode(step, self._share.world_size) if step else None
        return fetched, self._stream_position()

    def _stream_position(self) -> Position | None:
        return None if self._stream is None else self._stream.position


def count_positions(batches: list[Batch], is_masked_model: bool, device: torch.device) -> Tensor:
    """Count the target positions, the compared positions, the real positions, and all positions
    including padding.
    """
    totals = torch.zeros(4, dtype=torch.long)
    for batch in batches:
        labels_BT = batch["labels"]
        num_real = (labels_BT != IGNORED_LABEL).sum()
        num_all = torch.tensor(labels_BT.numel())
        totals += torch.stack([*count(labels_BT, is_masked_model), num_real, num_all])
    return to_device({"totals": totals}, device)["totals"]


def in_turns(batches: list[Batch], num_turns: int) -> list[list[Batch]]:
    """Return a step's micro-batches in the number of turns that Trainer takes per step. The last
    one, which sums gradients over the ranks, has one micro-batch.

    A step of chats has more micro-batches than other steps, or fewer. A turn may have none.
    """
    if num_turns == 1:
        return [batches]
    num_before = len(batches) - 1
    bounds = [i * num_before // (num_turns - 1) for i in range(num_turns)] + [len(batches)]
    return [batches[start:stop] for start, stop in pairwise(bounds)]
