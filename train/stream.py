"""Rows of a stream, made while training: in an order that depends on the seed alone, and from any
saved position.

A text is read pass after pass, in blocks, in which `--shuffle_buffer` documents at a time are
shuffled. Chunks of a block are tokenized and packed into rows, by several processes if wanted. A
position in the stream is where its block begins in the text, the chunk in the block and the row in
the chunk, so it is small and resuming loses nothing. A mixture takes its next row from the text
that is furthest behind its share of tokens.

Only the first rank reads a stream, and `train.dealing` sends its rows to the others.
"""

import os
import random
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count, islice, takewhile
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, Protocol

from datasets import IterableDataset

from patching.files.columns import UnusableText
from patching.files.texts import state_of_files

Row = dict[str, list[int]]
Documents = list[Any]
"""Texts, or lists of token ids."""
Columns = dict[str, list[list[int]]]
"""Rows, given as columns."""
Cut = Callable[[Documents], Any]
"""Cuts documents into rows. A kind of stream knows what else it returns."""
Position = dict[str, Any]
"""Where to resume, as JSON."""

DOCUMENTS_PER_CHUNK = 1000
"""Documents that are tokenized at once, and packed into the same rows."""


class Stream(Protocol):
    """An endless sequence of rows. `position` says where the next row is."""

    position: Position | None

    def __iter__(self) -> Iterator[Row]: ...

    def resume(self, position: Position | None) -> None:
        """Go to a position, or back to the start."""

    def check(self, num_rows: int) -> str | None:
        """Raise UnusableText if a text holds no row. Return a line to print, if there is one, such
        as that a pass over the text is less than the `num_rows` of a step. Must not be called once
        rows were read.
        """


class TextChanged(OSError):
    """The files of a text changed, or are gone, while a run reads them."""


class TextStream:
    """The rows of the text `name`, pass after pass. `workers` cut chunks of documents into rows.

    Raises UnusableText, when it is read, if the text cannot be read any further or what it holds
    cannot be used, and TextChanged if it is local and its files changed. No change is noticed
    unless it `reads_files`, which is False for a copy of the text.
    """

    def __init__(
        self,
        name: str,
        documents: IterableDataset,
        workers: "Workers",
        shuffle_buffer: int,
        seed: int,
        reads_files: bool = True,
    ) -> None:
        self._files = state_of_files(name) if reads_files else None
        self.name, self._documents, self._workers = name, documents, workers
        self._shuffle_buffer, self._seed = shuffle_buffer, seed
        self._block_size = max(shuffle_buffer, DOCUMENTS_PER_CHUNK)
        self.position: Position | None = None

    def resume(self, position: Position | None) -> None:
        self.position = position

    def check(self, num_rows: int = 1) -> str | None:
        in_first_pass = takewhile(lambda _: not self.position["pass"], islice(self, num_rows))
        found = sum(1 for _ in in_first_pass)
        self.position = None
        if found == num_rows:
            return None
        return (
            f"dataset={self.name}: a pass over it makes {found:,} rows, a step takes {num_rows:,}, "
            "so each step reads it more than once; --gradient_accumulation_steps makes it smaller"
        )

    def columns_of(self, cut: Any, is_new: bool) -> Columns:
        """Return the rows that a chunk was cut into. A resumed stream cuts a chunk again, which
        then is not new.
        """
        return cut

    def position_at(self, at: Position, row: int) -> Position:
        """Return the position of a row of the chunk at a position."""
        return {**at, "row": row}

    def __iter__(self) -> Iterator[Row]:
        """Raises UnusableText if the text holds no row."""
        start = self.position or {"pass": 0, "block": 0, "text": None, "chunk": 0, "row": 0}
        skipped, last_pass_with_rows = start["row"], start["pass"]
        is_new = self.position is None
        for at, cut in self._workers.cut(self._chunks(start)):
            columns, is_new = self.columns_of(cut, is_new), True
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            if rows:
                last_pass_with_rows = at["pass"]
            elif at["pass"] > last_pass_with_rows + 1:  # a resumed pass may be at its end
                raise UnusableText(
                    f"dataset={self.name}: there is no text in it to train on; its first "
                    "documents are held out (--heldout_documents)"
                )
            for i, row in enumerate(rows[skipped:], skipped):
                self.position = self.position_at(at, i + 1)
                yield row
            skipped = 0

    def _chunks(self, start: Position) -> Iterator[tuple[Position, Documents]]:
        """Yield chunks of documents with their positions, from the chunk of `start` on. A pass ends
        with an empty chunk, so that an empty text is noticed.
        """
        documents, first_chunk = self._documents, start["chunk"]
        for pass_idx in count(start["pass"]):
            documents.set_epoch(pass_idx)
            if start["text"] is not None:
                documents.load_state_dict(start["text"])
            reader = iter(documents)
            for block_idx in count(start["block"]):
                at = {"pass": pass_idx, "block": block_idx, "text": start["text"]}
                block = self._read_block(reader)
                start = {"text": documents.state_dict()}
                block = self._shuffled(block, f"{self._seed} {pass_idx} {block_idx}")
                chunks = range(0, len(block), DOCUMENTS_PER_CHUNK)
                for chunk_idx, first in islice(enumerate(chunks), first_chunk, None):
                    chunk = block[first : first + DOCUMENTS_PER_CHUNK]
                    yield {**at, "chunk": chunk_idx}, chunk
                first_chunk = 0
                if not block:
                    yield {**at, "chunk": 0}, []
                    break
            start = {"text": None, "block": 0}

    def _read_block(self, reader: Iterator[dict[str, Any]]) -> Documents:
        try:
            return [document["text"] for document in islice(reader, self._block_size)]
        except UnusableText:
            raise
        except Exception as error:  # parsers and decompressors raise errors of their own
            raise UnusableText(
                f"dataset={self.name} cannot be read any further: "
                f"{str(error) or type(error).__name__}"
            ) from error
        finally:  # also in place of what a parser makes of half a line
            if self._files is not None and state_of_files(self.name) != self._files:
                raise TextChanged(f"dataset={self.name}: its files changed while they were read")

    def _shuffled(self, block: Documents, seed: str) -> Documents:
        random_numbers, shuffled = random.Random(seed), []
        for first in range(0, len(block), self._shuffle_buffer):
            group = block[first : first + self._shuffle_buffer]
            random_numbers.shuffle(group)
            shuffled += group
        return shuffled


class Mixture:
    """Rows of several streams, so that each has its share of the tokens at any time."""

    def __init__(self, streams: list[Stream], weights: list[float]) -> None:
        self._streams, self._weights = streams, weights
        self._num_tokens = [0] * len(streams)

    @property
    def position(self) -> Position | None:
        positions = [stream.position for stream in self._streams]
        if all(position is None for position in positions):
            return None
        return {"texts": positions, "num_tokens": list(self._num_tokens)}

    def resume(self, position: Position | None) -> None:
        num_streams = len(self._streams)
        if position is None:
            position = {"texts": [None] * num_streams, "num_tokens": [0] * num_streams}
        self._num_tokens = list(position["num_tokens"])
        for stream, of_stream in zip(self._streams, position["texts"]):
            stream.resume(of_stream)

    def check(self, num_rows: int) -> str | None:
        total = sum(self._weights)
        found = [
            stream.check(max(1, int(num_rows * weight / total)))
            for stream, weight in zip(self._streams, self._weights)
        ]
        return "\n".join(filter(None, found)) or None

    def __iter__(self) -> Iterator[Row]:
        readers = [iter(stream) for stream in self._streams]
        while True:
            behind = [num / weight for num, weight in zip(self._num_tokens, self._weights)]
            i = behind.index(min(behind))
            row = next(readers[i])
            self._num_tokens[i] += len(row["input_ids"])
            yield row


class Workers:
    """Processes that cut chunks of documents into rows ahead of training, or this one alone."""

    def __init__(self, cut: Cut, num_processes: int) -> None:
        self._cut, self._num_processes = cut, num_processes
        self._pool: ProcessPoolExecutor | None = None

    def cut(self, chunks: Iterator[tuple[Position, Documents]]) -> Iterator[tuple[Position, Any]]:
        """Yield each chunk's position and rows, in order."""
        if self._num_processes == 1:
            for position, documents in chunks:
                yield position, self._cut(documents)
            return
        if self._pool is None:
            # Spawned, since forking a process that has threads and an accelerator is unsafe.
            self._pool = ProcessPoolExecutor(
                self._num_processes, get_context("spawn"), _begin_worker, (self._cut,)
            )
        ahead: deque[tuple[Position, Future]] = deque()
        for chunk_position, documents in chunks:
            ahead.append((chunk_position, self._pool.submit(_cut_in_worker, documents)))
            if len(ahead) > self._num_processes:
                position, future = ahead.popleft()
                yield position, future.result()


_cut_of_worker: list[Cut] = []


def _begin_worker(cut: Cut) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, and the parent ends it
    _cut_of_worker.append(cut)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed, which would otherwise wait for work forever."""
    parent_process().join()
    os._exit(1)


def _cut_in_worker(documents: Documents) -> Any:
    return _cut_of_worker[0](documents)
