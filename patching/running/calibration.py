"""Calibration text: the few documents on which models and layers are compared."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from patching.files.texts import load_documents

ROWS_PER_BATCH = 4


@dataclass(frozen=True)
class Calibration:
    """Some documents."""

    name: str
    """What to call them in reports."""
    texts: list[str] | list[list[int]]
    """As text, or as token ids."""
    length: int
    """Tokens that are read of each document."""

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
        """Read the first documents of a text file, a folder of them or a hub dataset.

        The first `skip` documents are skipped. Documents without text do not count.

        Raises ValueError or OSError if there is no text.
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
        """A hash that differs for different texts of the same name."""
        texts = [text if isinstance(text, str) else json.dumps(text) for text in self.texts]
        return hashlib.sha256("\0".join([*texts, str(self.length)]).encode()).hexdigest()

    def batches(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
    ) -> list[dict[str, Tensor]]:
        """Return batches of `input_ids` and `attention_mask`, each of shape (B, T), padded on the
        right and not longer than a model of this config can read.
        """
        length = min(self.length, getattr(config, "max_position_embeddings", self.length))
        if isinstance(self.texts[0], str):
            rows = tokenizer(self.texts, truncation=True, max_length=length)["input_ids"]
        else:
            rows = [ids[:length] for ids in self.texts]
        return padded_batches([row for row in rows if row])


def padded_batches(rows: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Return rows of token ids as batches of `input_ids` and `attention_mask`, each of shape
    (B, T), padded on the right.
    """
    batches = []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        batch = rows[start : start + ROWS_PER_BATCH]
        length = max(map(len, batch))
        ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
        batches.append({"input_ids": ids_BT, "attention_mask": mask_BT})
    return batches
