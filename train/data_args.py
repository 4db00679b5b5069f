"""Flags for the text to train on and how it is cut into rows."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Packing = Literal["documents", "cross", "False"]


@dataclass
class DataArguments:
    _argument_group_name = "the text"

    dataset: str = field(
        default="EleutherAI/the_pile_deduplicated",
        metadata={
            "help": "text to train on: a .txt, .jsonl or .parquet file, a folder of them, or a hub "
            "dataset, which is streamed. In .txt files, blank lines separate documents"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub dataset"}
    )
    dataset_split: str = field(default="train", metadata={"help": "split of a hub dataset"})
    streaming: bool = field(
        default=False,
        metadata={"help": "tokenize local files during training, not before, like a hub dataset"},
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "held-out text, named like --dataset (default: hold out some documents of "
            "--dataset)"
        },
    )
    heldout_documents: int = field(
        default=64,
        metadata={
            "help": "number of documents of --dataset to hold out: a random sample of local text, "
            "at most a tenth of it, or the first ones of a stream; 0 for none"
        },
    )
    max_length: int = field(default=2048, metadata={"help": "tokens per row"})
    packing: str = field(
        default="documents",
        metadata={
            "help": "how documents, joined with the end-of-text token, fill rows: `documents` do "
            "not see each other, `cross` lets each see those before it in its row, and with False "
            "each one is a row of its own, cut at --max_length",
            "choices": get_args(Packing),
        },
    )

    def __post_init__(self) -> None:
        problems = []
        if self.packing not in get_args(Packing):
            choices = ", ".join(get_args(Packing))
            problems.append(f"packing={self.packing}: choose one of {choices}")
        if self.max_length < 2:
            problems.append(f"max_length={self.max_length}: a row needs at least 2 tokens")
        if self.heldout_documents < 0:
            problems.append(f"heldout_documents={self.heldout_documents}: choose 0 or more")
        if problems:
            raise ValueError("; ".join(problems))
