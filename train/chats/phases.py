"""The two phases of a run with chats: steps of text, then steps of chats, under one schedule.

A step of chats takes as many rows as it needs for as many loss tokens as a step of text had on
average. What a step takes beyond that, because rows are not divided, the next one takes less.
"""

from collections.abc import Iterator
from itertools import islice

from train.stream import Position, Row, Stream


class Phases:
    """Rows of each step: those of `text` for `num_text_steps`, then those of `chats`.

    `text` is None if there are no such steps. A step of chats then has as many loss tokens as its
    rows have of `max_length` tokens.
    """

    def __init__(
        self, text: Stream | None, chats: Stream, num_text_steps: int, max_length: int
    ) -> None:
        self._text, self.chats = text, chats
        self.num_text_steps, self._max_length = num_text_steps, max_length
        self._num_steps = self._num_steps_of_text = 0
        self._text_tokens = 0
        """Loss tokens of the steps of text so far."""
        self._ahead = 0.0
        """Loss tokens that the steps of chats so far took beyond their share."""

    @property
    def position(self) -> Position | None:
        """Where the next step begins, None for the start."""
        if not self._num_steps:
            return None
        return {
            "num_steps": self._num_steps,
            "num_steps_of_text": self._num_steps_of_text,
            "text_tokens": self._text_tokens,
            "ahead": self._ahead,
            "text": self._text and self._text.position,
            "chats": self.chats.position,
        }

    def resume(self, position: Position) -> None:
        self._num_steps, self._ahead = position["num_steps"], position["ahead"]
        self._num_steps_of_text = position["num_steps_of_text"]
        self._text_tokens = position["text_tokens"]
        for stream, of_stream in ((self._text, position["text"]), (self.chats, position["chats"])):
            if stream is not None and of_stream is not None:
                stream.resume(of_stream)

    def check(self, num_rows: int) -> str | None:
        """Raise ValueError if a phase has no rows. Return lines about text that is smaller than a
        step of `num_rows`, and about chats that are left out.
        """
        of_text = None if self._text is None else self._text.check(num_rows)
        return "\n".join(filter(None, (of_text, self.chats.check()))) or None

    def steps(self, num_rows: int) -> Iterator[list[Row]]:
        """Yield the rows of each step, `num_rows` of text or as many of chats as are needed."""
        text, chats = iter(self._text or ()), iter(self.chats)
        while True:
            if self._num_steps < self.num_text_steps:
                rows = list(islice(text, num_rows))
                self._text_tokens += sum(map(num_targets, rows))
                self._num_steps_of_text += 1
            else:
                rows = self._rows_of_chats(chats, num_rows)
            self._num_steps += 1
            yield rows

    def _rows_of_chats(self, chats: Iterator[Row], num_rows: int) -> list[Row]:
        wanted = num_rows * self._max_length
        if self._text_tokens:
            wanted = self._text_tokens / self._num_steps_of_text
        self._ahead -= wanted
        rows: list[Row] = []
        while not rows or self._ahead < 0:
            rows.append(next(chats))
            self._ahead += num_targets(rows[-1])
        return rows


def num_targets(row: Row) -> int:
    """Count the tokens of a row that are predicted: not the first of a document, and of chats only
    those of responses.
    """
    starts, start = set(), 0
    for length in row.get("document_lengths", [len(row["input_ids"])]):
        starts.add(start)
        start += length
    if "labels" not in row:
        return len(row["input_ids"]) - len(starts)
    return sum(label >= 0 and i not in starts for i, label in enumerate(row["labels"]))
