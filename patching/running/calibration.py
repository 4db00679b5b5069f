"""TODO."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from patching.files.texts import (
    load_documents,
)

ROWS_PER_BATCH = 4


@dataclass(frozen=True)
class Calibration:
    """Documents, and what to call them."""

    name: str
    texts: list[str]
    length: int
    """Tokens of each that are read."""

    @classmethod
    def read(
        cls,
        name: str,
        *,
        dataset_config: str | None = None,
        dataset_split: str = "train",
        text_column: str = "text",
        num_texts: int = 64,
        skip: int = 0,
        length: int = 256,
    ) -> "Calibration":
        """The first documents of a text file, a folder of them or a hub dataset, after `skip`
        others.

        Raises ValueError or OSError if there are none.
        """
        documents = load_documents(
            name,
            text_column=text_column,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
        )
        with_text = (
            document["text"]
            for document in documents
            if document["text"] and document["text"].strip()
        )
        texts = list(islice(with_text, skip, skip + num_texts))
        if not texts:
            skipped = f" after its first {skip}" if skip else ""
            raise ValueError(f"calibration={name}: there is no text in it{skipped}")
        which = f"texts {skip + 1}-{skip + len(texts)}" if skip else f"the first {len(texts)} texts"
        return cls(f"{which} of {Path(name).name}", texts, length)

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
