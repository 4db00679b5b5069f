"""Read documents from local files or a hub dataset, and find documents that two texts share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst")
"""Endings that may follow those of text files."""
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
LONG_LINE = 40
"""Characters from which on a line is unlikely to be in two documents by chance."""


def num_found_in(texts: Iterable[str], others: Iterable[str]) -> int:
    """Count the texts that also appear in the others, however these are cut into documents.

    A text appears in them if half of its long lines do. A text without long lines must appear
    whole.
    """
    known = {line for other in others for line in _long_lines(other)}
    lines = [_long_lines(text) for text in texts]
    return sum(2 * len(of_text & known) >= len(of_text) for of_text in lines)


def _long_lines(text: str) -> set[str]:
    lines = {line.strip() for line in text.splitlines()}
    return {line for line in lines if len(line) >= LONG_LINE} or {text.strip()}


def load_documents(
    name: str,
    *,
    text_column: str = "text",
    dataset_config: str | None = None,
    dataset_split: str = "train",
    streaming: bool = False,
    holds_tokens: bool = False,
) -> Dataset | IterableDataset:
    """Return documents in one column, `text`, whose values are lists of token ids if the named
    column `holds_tokens`.

    `name` is a file, a folder of files or a hub dataset. Plain text is split into documents at
    blank lines. A hub dataset is always streamed, local files only if `streaming` is set.

    Raises ValueError if there is no text, no such column, or no file of a known kind.
    """
    column = text_column
    documents, builder = open_dataset(name, dataset_config, dataset_split, streaming)
    if builder == "text" and holds_tokens:
        raise ValueError(f"tokens_column={column}: {name} is plain text and has no columns")
    column = "text" if builder == "text" else column
    flag = "tokens_column" if holds_tokens else "text_column"
    columns = columns_of(documents, name)
    if column not in columns:
        raise ValueError(
            f"{flag}={column}: {name} has the columns {', '.join(columns)}, choose one of them"
        )
    value = next(iter(documents), {}).get(column)
    wanted, expected = (list, "lists of token ids") if holds_tokens else (str, "text")
    if value is not None and not isinstance(value, wanted):
        raise ValueError(
            f"{flag}={column}: it holds {type(value).__name__} values in {name} and no {expected}, "
            f"choose one of {', '.join(columns)}"
        )
    documents = documents.select_columns([column])
    if column != "text":
        documents = documents.rename_column(column, "text")
    if builder == "text":
        documents = documents.map(_split_at_blank_lines, batched=True, batch_size=1)
    return documents


def open_dataset(
    name: str, dataset_config: str | None, dataset_split: str, streaming: bool
) -> tuple[Dataset | IterableDataset, str | None]:
    """Return what a file, a folder of files or a hub dataset holds, and the `datasets` builder that
    reads local files.

    Raises ValueError for files that are empty, of no known kind or of several, or damaged.
    """
    from datasets import load_dataset  # takes a second, and most command lines need no text
    from datasets.exceptions import DatasetGenerationError

    path = Path(name)
    if not path.exists():
        return load_dataset(name, dataset_config, split=dataset_split, streaming=True), None
    builder, files = _local_files(path)
    extra = {"sample_by": "document"} if builder == "text" else {}
    try:
        documents = load_dataset(
            builder, data_files=files, split="train", streaming=streaming, **extra
        )
    except DatasetGenerationError as error:
        cause = str(error.__cause__ or error)
        raise ValueError(f"dataset={name} cannot be read as {builder}: {cause}") from error
    return documents, builder


def columns_of(documents: Dataset | IterableDataset, name: str) -> list[str]:
    """Return the columns of a dataset. Raises ValueError if it is empty."""
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns:
        raise ValueError(f"dataset={name}: there is no text in it")
    return columns


def _local_files(path: Path) -> tuple[str, list[str]]:
    """Return the name of the `datasets` builder for a file or folder, and the files in it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    kinds = {file: BUILDERS.get(_kind(file)) for file in files}
    known = [file for file in files if kinds[file] is not None]
    builders = {kinds[file] for file in known}
    if len(builders) != 1:
        found = "several kinds" if builders else "none of these"
        raise ValueError(
            f"dataset={path}: name a .txt, .jsonl, .csv or .parquet file, which may be compressed "
            f"(.gz, .zst), or a folder of one kind; there is {found}"
        )
    files_with_text = [str(file) for file in known if file.stat().st_size]
    if not files_with_text:
        raise ValueError(f"dataset={path}: there is no text in it")
    return builders.pop(), files_with_text


def _kind(file: Path) -> str:
    """Return the ending that says what a file holds, without that of its compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def _split_at_blank_lines(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"text": [piece for text in batch["text"] for piece in BLANK_LINES.split(text)]}
