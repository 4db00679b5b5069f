"""Read documents from local files or a hub dataset, and find documents that two texts share."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patching.files.columns import Column
from patching.files.hashes import file_hash

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

    Raises ValueError if there is no text, no such column, no file of a known kind, or something
    else in the column. A stream may raise UnusableText only when it is read.
    """
    column = text_column
    documents, builder, columns, first = open_dataset(
        name, dataset_config, dataset_split, streaming
    )
    if builder == "text" and holds_tokens:
        raise ValueError(f"tokens_column={column}: {name} is plain text and has no columns")
    column = "text" if builder == "text" else column
    flag = "tokens_column" if holds_tokens else "text_column"
    if column not in columns:
        raise ValueError(
            f"{flag}={column}: {name} has the columns {', '.join(columns)}, choose one of them"
        )
    to_check, types = Column(flag, column, name, holds_tokens), documents.features
    if types is not None:
        to_check.check_type(types[column], columns)
    to_check.check_document(first.get(column), 0)
    documents = documents.select_columns([column])
    if column != "text":
        documents = documents.rename_column(column, "text")
    if builder == "text":
        documents = documents.map(_split_at_blank_lines, batched=True, batch_size=1)
    elif holds_tokens or types is None:
        documents = to_check.checked(documents)
    return documents


class OpenDataset(NamedTuple):
    """What a file, a folder of files or a hub dataset holds."""

    documents: Dataset | IterableDataset
    builder: str | None
    """The `datasets` builder that reads local files."""
    columns: list[str]
    first: dict[str, Any]
    """The first document."""


def open_dataset(
    name: str,
    dataset_config: str | None,
    dataset_split: str,
    streaming: bool,
    flag: str = "dataset",
) -> OpenDataset:
    """Return what a file, a folder of files or a hub dataset holds.

    Raises ValueError, which names the `flag`, for files that are empty, of no known kind or of
    several, or damaged, and for a hub dataset that cannot be read.
    """
    from datasets import config, load_dataset  # takes a second, and most commands need no text

    path = Path(name)
    is_here = path.exists()
    builder, files = _local_files(path, flag) if is_here else (None, [])
    extra = {"sample_by": "document"} if builder == "text" else {}
    if not streaming and files:
        # What was read before is cached. The library goes by the time of a file's last change,
        # which a copy may share with what it replaces, and this puts the content into the key.
        extra["description"] = " ".join(file_hash(Path(file)) for file in files)
    logger = logging.getLogger("datasets")  # it prints what the error says again
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        if is_here:
            documents = load_dataset(
                builder, data_files=files, split="train", streaming=streaming, **extra
            )
        else:
            documents = load_dataset(name, dataset_config, split=dataset_split, streaming=True)
        first = next(iter(documents), {})
    except Exception as error:  # parsers and decompressors raise errors of their own
        root = error.__cause__ or error
        cause = str(root) or type(error).__name__
        if is_here and not streaming and _is_of_cache(root, files):
            raise ValueError(
                f"{flag}={name} cannot be kept in {config.HF_DATASETS_CACHE} ({root.strerror}): "
                "set HF_DATASETS_CACHE to a folder that has room and can be written"
            ) from error
        raise ValueError(
            f"{flag}={name} cannot be read as {builder}: {cause}; download or save it again"
            if is_here
            else f"{flag}={name}: this is neither a file or folder here nor a hub dataset that can "
            f"be read ({cause})"
        ) from error
    finally:
        logger.setLevel(level)
    columns = documents.column_names or list(first)
    if not columns:
        raise ValueError(f"{flag}={name}: there is no text in it")
    return OpenDataset(documents, builder, columns, first)


def _is_of_cache(error: BaseException, files: list[str]) -> bool:
    """Whether `datasets` failed to write what it keeps, and not to read the files."""
    if not isinstance(error, OSError) or error.errno is None:
        return False
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    read = {Path(file).resolve() for file in files}
    return error.filename is not None and Path(os.fsdecode(error.filename)).resolve() not in read


def _local_files(path: Path, flag: str) -> tuple[str, list[str]]:
    """Return the name of the `datasets` builder for a file or folder, and the files in it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    kinds = {file: BUILDERS.get(_kind(file)) for file in files}
    known = [file for file in files if kinds[file] is not None]
    builders = {kinds[file] for file in known}
    if len(builders) != 1:
        found = "several kinds" if builders else "none of these"
        raise ValueError(
            f"{flag}={path}: name a .txt, .jsonl, .csv or .parquet file, which may be compressed "
            f"(.gz, .zst), or a folder of one kind; there is {found}"
        )
    files_with_text = [str(file) for file in known if file.stat().st_size]
    if not files_with_text:
        raise ValueError(f"{flag}={path}: there is no text in it")
    return builders.pop(), files_with_text


def state_of_files(name: str) -> list[tuple[str, int, int, int]]:
    """Return path, size and times of each file of a local text, by which to notice that one
    changed or is gone. Empty for a hub dataset.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in found]


def _kind(file: Path) -> str:
    """Return the ending that says what a file holds, without that of its compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def _split_at_blank_lines(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"text": [piece for text in batch["text"] for piece in BLANK_LINES.split(text)]}
