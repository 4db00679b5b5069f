"""Text as users name it, local files or a hub dataset, and the few documents that calibrate.

Shapes: B rows, T positions.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
ROWS_PER_BATCH = 4
LONG_LINE = 40
"""Characters of a line that hardly stands in two documents by chance."""


@dataclass
class CalibrationArguments:
    """Flags that name the text layers and models are compared on."""

    calibration: str | None = field(
        default=None,
        metadata={
            "help": "text to compare layers and models on: a .txt, .jsonl or .parquet file, a "
            "folder of them, or a hub dataset"
        },
    )
    calibration_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub dataset of calibration text"}
    )
    calibration_split: str = field(
        default="train", metadata={"help": "split of a hub dataset of calibration text"}
    )
    calibration_column: str = field(
        default="text", metadata={"help": "column that holds the calibration text"}
    )
    calibration_texts: int = field(
        default=64, metadata={"help": "documents of the calibration text, its first ones"}
    )
    calibration_skip: int = field(
        default=0, metadata={"help": "documents passed over before those, for another sample"}
    )
    calibration_length: int = field(
        default=256, metadata={"help": "tokens of each calibration document, its first ones"}
    )

    def check_calibration(self, needed_since: str | None = None) -> list[str]:
        """What is wrong with these flags; that no text is named too, where there is a reason to
        need some.
        """
        problems = [
            f"{name}={value}: choose {least} or more"
            for name, value, least in (
                ("calibration_texts", self.calibration_texts, 1),
                ("calibration_skip", self.calibration_skip, 0),
                ("calibration_length", self.calibration_length, 2),
            )
            if value < least
        ]
        if needed_since and self.calibration is None:
            problems.append(f"{needed_since}: name some with --calibration")
        return problems


@dataclass(frozen=True)
class Calibration:
    """Documents, and what to call them."""

    name: str
    texts: list[str]
    length: int
    """Tokens of each that are read."""

    @classmethod
    def read(cls, arguments: CalibrationArguments) -> "Calibration":
        """The documents the flags name. Raises ValueError or OSError where there are none."""
        name = arguments.calibration
        documents = load_documents(
            name,
            text_column=arguments.calibration_column,
            dataset_config=arguments.calibration_config,
            dataset_split=arguments.calibration_split,
        )
        skip = arguments.calibration_skip
        with_text = (
            document["text"]
            for document in documents
            if document["text"] and document["text"].strip()
        )
        texts = list(islice(with_text, skip, skip + arguments.calibration_texts))
        if not texts:
            behind = f" behind its first {skip}" if skip else ""
            raise ValueError(f"calibration={name}: there is no text in it{behind}")
        which = f"texts {skip + 1}-{skip + len(texts)}" if skip else f"the first {len(texts)} texts"
        return cls(
            f"{which} of {Path(name).name}",
            texts,
            arguments.calibration_length,
        )

    @property
    def sha256(self) -> str:
        """Tells these texts from others of the same name."""
        return hashlib.sha256("\0".join([*self.texts, str(self.length)]).encode()).hexdigest()

    def batches(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> list[dict[str, Tensor]]:
        """`input_ids` and `attention_mask`, each (B, T), padded on the right, no longer than a
        model of this config reads.
        """
        length = min(self.length, getattr(config, "max_position_embeddings", self.length))
        rows = tokenizer(self.texts, truncation=True, max_length=length)["input_ids"]
        return padded_batches([row for row in rows if row])


def num_found_in(texts: Iterable[str], others: Iterable[str]) -> int:
    """How many texts stand in the others, however either are cut into documents: half of their
    lines, those of a few words aside, or the whole text where it has only such.
    """
    known = {line for other in others for line in _long_lines(other)}
    lines = [_long_lines(text) for text in texts]
    return sum(2 * len(of_text & known) >= len(of_text) for of_text in lines)


def _long_lines(text: str) -> set[str]:
    lines = {line.strip() for line in text.splitlines()}
    return {line for line in lines if len(line) >= LONG_LINE} or {text.strip()}


def padded_batches(rows: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Rows of token ids as `input_ids` and `attention_mask`, each (B, T), padded on the right."""
    batches = []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        length = max(map(len, batch))
        ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
        batches.append({"input_ids": ids_BT, "attention_mask": mask_BT})
    return batches


def load_documents(
    name: str,
    *,
    text_column: str = "text",
    dataset_config: str | None = None,
    dataset_split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Documents in one column, `text`. A hub dataset is streamed, local files only when asked.

    Raises ValueError where there is no text, no such column, or no file of a known kind.
    """
    path = Path(name)
    column = text_column
    if path.exists():
        builder, files = _local_files(path)
        extra = {"sample_by": "document"} if builder == "text" else {}
        try:
            documents = load_dataset(
                builder, data_files=files, split="train", streaming=streaming, **extra
            )
        except DatasetGenerationError as error:
            cause = str(error.__cause__ or error)
            raise ValueError(f"dataset={name} cannot be read as {builder}: {cause}") from error
        column = "text" if builder == "text" else column
    else:
        documents = load_dataset(name, dataset_config, split=dataset_split, streaming=True)
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns:
        raise ValueError(f"dataset={name}: there is no text in it")
    if column not in columns:
        raise ValueError(
            f"text_column={column}: {name} has the columns {', '.join(columns)}, choose one of them"
        )
    documents = documents.select_columns([column])
    if column != "text":
        documents = documents.rename_column(column, "text")
    if path.exists() and builder == "text":
        documents = documents.map(_split_at_blank_lines, batched=True, batch_size=1)
    return documents


def _local_files(path: Path) -> tuple[str, list[str]]:
    """The `datasets` builder for a file or folder, and the files in it."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    known = [file for file in files if file.suffix in BUILDERS]
    builders = {BUILDERS[file.suffix] for file in known}
    if len(builders) != 1:
        found = "none of these" if not builders else "several kinds"
        raise ValueError(
            f"dataset={path}: name a .txt, .jsonl or .parquet file or a folder of one kind; "
            f"there is {found}"
        )
    files_with_text = [str(file) for file in known if file.stat().st_size]
    if not files_with_text:
        raise ValueError(f"dataset={path}: there is no text in it")
    return builders.pop(), files_with_text


def _split_at_blank_lines(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"text": [piece for text in batch["text"] for piece in BLANK_LINES.split(text)]}
