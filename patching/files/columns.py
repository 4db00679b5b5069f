"""Check that a column of documents holds text, or lists of token ids.

The type of a column says most of it before any document is read. It does not say whether a list has
gaps, and some streams have no types. What is left is checked in all documents of local files, and
of a stream document by document, as it is read.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

STRINGS = ("string", "large_string", "string_view")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NOTHING = "null"
"""Type of a column, or of the items of its lists, in which no document has a value."""
LONGEST_VALUE = 40
"""Characters of a value in a message."""


class UnusableText(ValueError):
    """A text holds what cannot be used. Of a stream, only reading it may show that."""


class Column(NamedTuple):
    """A column of a text, and what it should hold."""

    flag: str
    """The flag that names the column."""
    name: str
    dataset: str
    holds_tokens: bool

    def check_type(self, feature: Any, columns: list[str]) -> None:
        """Raise UnusableText unless a column of this type, a feature of `datasets`, can hold what
        it should. `columns` are those to choose from.
        """
        kinds, expected = STRINGS, "text"
        if self.holds_tokens:
            kinds = [f"lists of {kind}" for kind in (*INTEGERS, NOTHING)]
            expected = "lists of token ids"
        found = _kind_of(feature)
        if found not in (*kinds, NOTHING):
            others = ", ".join(column for column in columns if column != self.name)
            raise UnusableText(
                f"{self.flag}={self.name}: it holds {found} values in {self.dataset} and no "
                f"{expected}; correct it{others and f', or choose one of {others}'}"
            )

    def check_document(self, value: Any, document_idx: int) -> None:
        """Raise UnusableText unless a document is empty or what it should be."""
        wrong = self._wrong_in(value)
        if wrong is not None:
            raise UnusableText(
                f"{self.flag}={self.name}: document {document_idx + 1:,} of {self.dataset} "
                f"{wrong}; correct it, or leave it out"
            )

    def _wrong_in(self, value: Any) -> str | None:
        if value is None:
            return None
        if not self.holds_tokens:
            return None if isinstance(value, str) else f"is {_short(value)}, which is no text"
        if not isinstance(value, list):
            return f"is {_short(value)}, which is no list of token ids"
        if {*map(type, value)} <= {int}:
            return None
        other = next(item for item in value if type(item) is not int)
        return f"holds {_short(other)}, which is no token id"

    def checked(self, documents: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Return documents without an unusable one: local ones are all checked here, those of a
        stream as they are read.
        """
        from datasets import IterableDataset

        if isinstance(documents, IterableDataset):
            return documents.map(partial(_checked, column=self), with_indices=True)
        if self.holds_tokens and _have_gaps(documents):
            for i, document in enumerate(documents):
                self.check_document(document["text"], i)
        return documents


def _checked(document: dict[str, Any], document_idx: int, column: Column) -> dict[str, Any]:
    column.check_document(document["text"], document_idx)
    return document


def _have_gaps(documents: Dataset) -> bool:
    import pyarrow.compute

    column = documents.data.column("text")
    if pyarrow.types.is_null(column.type):
        return False
    return pyarrow.compute.list_flatten(column).null_count > 0


def _kind_of(feature: Any) -> str:
    """Return what a column of this type holds, in words."""
    from datasets import Json, LargeList, List, Value

    if isinstance(feature, List | LargeList):
        return f"lists of {_kind_of(feature.feature)}"
    if isinstance(feature, Value):
        return feature.dtype
    return "mixed" if isinstance(feature, Json) else type(feature).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
