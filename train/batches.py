"""TODO."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from train.data import DOCUMENTS_PER_BATCH
from train.loss import IGNORED_LABEL


class StreamBatches:
    """Micro-batches of a stream, pass after pass without end, from any state it was left in."""

    def __init__(self, rows: IterableDataset, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.state: dict[str, Any] | None = None
        """Where the next micro-batch begins, None for the start."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        num_passes_without_rows = 0
        while num_passes_without_rows < 2:  # a resumed pass may be at its end
            num_passes_without_rows += 1
            batch = []
            for row in self.rows:
                num_passes_without_rows = 0
                batch.append(row)
                if len(batch) == self.batch_size:
                    self.state = self.rows.state_dict()
                    yield collate(batch)
                    batch = []
            if batch:
                self.state = self.rows.state_dict()
                yield collate(batch)
            self.rows.set_epoch(self.rows.epoch + 1)
        raise ValueError(
            "the stream holds no text for this rank: give each rank "
            f"{DOCUMENTS_PER_BATCH} documents or more, or use fewer ranks"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.set_epoch(state["epoch"])
        self.rows.load_state_dict(state)
        self.state = state


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Rows as tensors of shape (B, T), padded on the right to the longest.

    `labels` are the tokens, IGNORED_LABEL at padding. What is padding follows from the lengths,
    never from a token's id: end of text is often the padding token too and yet a real target.
    Without padding there is no `attention_mask`, which lets attention take its plain causal path.
    """
    length = max(len(row["input_ids"]) for row in rows)
    lengths_B1 = torch.tensor([[len(row["input_ids"])] for row in rows])
    input_ids_BT = torch.tensor([_padded(row["input_ids"], length) for row in rows])
    mask_BT = torch.arange(length)[None] < lengths_B1
    batch: dict[str, Tensor] = {
        "input_ids": input_ids_BT,
        "labels": input_ids_BT.masked_fill(~mask_BT, IGNORED_LABEL),
    }
    if not mask_BT.all():
        batch["attention_mask"] = mask_BT.long()
    return batch


def _padded(ids: list[int], length: int) -> list[int]:
    return [*ids, *[0] * (length - len(ids))]
