"""Flags for the text to train on and how it is cut into rows."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args

DEFAULT_SHUFFLE_BUFFER = 1000

Packing = Literal["documents", "cross", "False"]


@dataclass
class DataArguments:
    _argument_group_name = "the text"

    dataset: str = field(
        default="EleutherAI/the_pile_deduplicated",
        metadata={
            "help": "text to train on: a .txt, .jsonl, .csv or .parquet file (or .gz, .zst), a "
            "folder of them, or a hub dataset, which is streamed. In .txt files, blank lines "
            "separate documents. Several texts with their shares of the tokens, such as "
            "wiki.jsonl=0.7,code.parquet=0.3, are mixed while they are streamed"
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
    tokens_column: str | None = field(
        default=None,
        metadata={
            "help": "column that holds token ids of the teacher's tokenizer, which are used as "
            "they are instead of text"
        },
    )
    shuffle_buffer: int | None = field(
        default=None,
        metadata={
            "help": "documents of a stream that are shuffled together (default: "
            f"{DEFAULT_SHUFFLE_BUFFER}); rows of local files are always all shuffled"
        },
    )
    tokenizer_processes: int = field(
        default=1, metadata={"help": "processes that tokenize; they do not change the rows"}
    )
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
    measure_order: bool = field(
        default=True,
        metadata={
            "help": "after training, search the order of patching and the scale of each size on "
            "documents that are neither trained on nor held out (of models that predict the next "
            "token)"
        },
    )
    order_documents: int = field(
        default=64,
        metadata={
            "help": "with --measure_order: number of documents of --dataset to set aside for it, "
            "chosen like those held out"
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
        for name in ("shuffle_buffer", "tokenizer_processes", "order_documents"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: choose 1 or more")
        if not problems:
            problems = self._silent_flags()
        if problems:
            raise ValueError("; ".join(problems))

    def _silent_flags(self) -> list[str]:
        """Return one line per flag that is given and that others silence. Raises ValueError for
        sources that are none.
        """
        names = [source.name for source in self.sources]
        if self.eval_dataset is not None:
            names.append(self.eval_dataset)
        are_local = all(Path(name).exists() for name in names)
        is_plain = all({".txt"} <= {*Path(name).suffixes} for name in names)
        is_read_whole = self.eval_dataset is not None and not self.streaming
        is_read_whole = is_read_whole and Path(self.eval_dataset).exists()
        silenced = {
            "order_documents": (not self.measure_order, "with --measure_order False"),
            "text_column": (
                self.tokens_column is not None or is_plain,
                "with --tokens_column" if self.tokens_column is not None else "on .txt files",
            ),
            "dataset_config": (are_local, "on local text"),
            "dataset_split": (are_local, "on local text"),
            "heldout_documents": (
                is_read_whole and self.heldout_documents > 0,
                "with a local --eval_dataset, which is read whole",
            ),
        }
        defaults = {each.name: each.default for each in fields(self)}
        return [
            f"{name} has no effect {why}, leave it out"
            for name, (is_silent, why) in silenced.items()
            if is_silent and getattr(self, name) != defaults[name]
        ]

    @property
    def num_set_aside(self) -> int:
        """Documents that are neither trained on nor held out."""
        return self.order_documents if self.measure_order else 0

    @property
    def num_held_out(self) -> int:
        """Documents that are held out of the training text."""
        return 0 if self.eval_dataset is not None else self.heldout_documents

    @property
    def sources(self) -> list["Source"]:
        return parse_sources(self.dataset)


class Source(NamedTuple):
    """A text of a mixture, and its weight among them."""

    name: str
    weight: float = 1.0


def parse_sources(dataset: str) -> list[Source]:
    """Return the texts that `--dataset` names: one, or several as NAME=WEIGHT with commas between.

    Raises ValueError for a weight that is no positive number, and for one text with a weight.
    """
    if "=" not in dataset or Path(dataset).exists():
        return [Source(dataset)]
    sources = []
    for part in dataset.split(","):
        name, _, weight = part.rpartition("=")
        try:
            sources.append(Source(name.strip(), float(weight)))
        except ValueError:
            sources.append(Source(name, -1.0))
        if not sources[-1].name or not 0 < sources[-1].weight < float("inf"):
            raise ValueError(
                f"dataset={dataset}: `{part}` is not NAME=WEIGHT with a weight above 0; write a "
                "mixture as wiki.jsonl=0.7,code.parquet=0.3"
            )
    if len(sources) == 1:
        raise ValueError(
            f"dataset={dataset}: a single text needs no weight, give {sources[0].name}"
        )
    return sources
