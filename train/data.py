"""Text to rows of tokens: local files or a stream, held-out documents, packing.

Documents are joined with the end-of-text token and cut into full rows. The rest of a batch of
documents becomes a shorter row, so no text is lost. Rows are padded only when they are batched. A
packed row records the lengths of its documents, or of their parts, unless they may see each other.

Local files are tokenized once, by the main process. A stream is tokenized during training: each
rank takes every `world_size`-th batch of documents, and can save its position and resume there.
"""

import random
from collections.abc import Iterable
from itertools import compress
from typing import NamedTuple

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from patching.files.texts import load_documents
from train.data_args import DataArguments, Packing

DOCUMENTS_PER_BATCH = 1000


class Share(NamedTuple):
    """Which part of the data a rank reads."""

    rank: int = 0
    world_size: int = 1


class Rows(NamedTuple):
    train: Dataset | IterableDataset
    held_out: Dataset | None

    @property
    def is_stream(self) -> bool:
        return isinstance(self.train, IterableDataset)


def load_rows(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    share: Share = Share(),  # noqa: B008
) -> Rows:
    """Return rows to train on and held-out rows, each row `{"input_ids": [...]}`.

    The training rows of a stream are this rank's share of it.

    Raises ValueError if there is no text, no such column, or no file of a known kind.
    """
    documents = documents_of(arguments, arguments.dataset)
    if arguments.eval_dataset is not None:
        held_out = documents_of(arguments, arguments.eval_dataset)
        if isinstance(held_out, IterableDataset):
            held_out = _in_memory(held_out.take(max(arguments.heldout_documents, 1)))
    else:
        documents, held_out = split_held_out(documents, arguments.heldout_documents, seed)
    if isinstance(documents, IterableDataset):
        train = tokenize_share(documents, tokenizer, arguments, seed, share)
    else:
        train = tokenize(documents, tokenizer, arguments)
    if isinstance(train, Dataset) and len(train) == 0:
        raise ValueError(f"dataset={arguments.dataset}: there is no text in it")
    if held_out is not None:
        held_out = tokenize(held_out, tokenizer, arguments)
        if len(held_out) == 0:
            raise ValueError(
                f"eval_dataset={arguments.eval_dataset or arguments.dataset}: the held-out "
                "documents are empty, give another --eval_dataset"
            )
    return Rows(train, held_out)


def documents_of(arguments: DataArguments, name: str) -> Dataset | IterableDataset:
    """Return documents in one column, `text`. A hub dataset is always streamed, local files only
    with `--streaming`.
    """
    return load_documents(
        name,
        text_column=arguments.text_column,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
        streaming=arguments.streaming,
    )


def split_held_out(
    documents: Dataset | IterableDataset, num_documents: int, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Return documents to train on and held-out ones: a random sample of local text, at most a
    tenth of it, or the first documents of a stream.
    """
    if num_documents == 0:
        return documents, None
    if isinstance(documents, IterableDataset):
        return documents.skip(num_documents), _in_memory(documents.take(num_documents))
    if len(documents) < 2:
        raise ValueError(
            "the dataset is a single document, so none can be held out: give --eval_dataset or "
            "--heldout_documents 0"
        )
    num_documents = min(num_documents, max(1, len(documents) // 10))
    parts = documents.train_test_split(test_size=num_documents, seed=seed)
    return parts["train"], parts["test"]


def _in_memory(documents: IterableDataset) -> Dataset:
    return Dataset.from_list(list(documents))


def tokenize(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments
) -> Dataset:
    """Return documents as rows of at most `max_length` token ids."""
    return documents.map(
        rows_of_documents,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns=["text"],
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": arguments.max_length,
            "packing": arguments.packing,
        },
    )


def tokenize_share(
    documents: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    seed: int,
    share: Share,
) -> IterableDataset:
    """Return a rank's share of a stream as rows. Documents are shuffled within their batch."""

    def rows_of_share(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list]:
        batch_idx = indices[0] // DOCUMENTS_PER_BATCH
        texts = list(batch["text"]) if batch_idx % share.world_size == share.rank else []
        # Not IterableDataset.shuffle: its buffer is not saved, so resuming would lose documents.
        random.Random(f"{seed} {batch_idx}").shuffle(texts)
        return rows_of_documents(
            {"text": texts}, tokenizer, arguments.max_length, arguments.packing
        )

    return documents.map(
        rows_of_share,
        with_indices=True,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns=["text"],
    )


def rows_of_documents(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: Packing,
) -> dict[str, list[list[int]]]:
    """Return rows of token ids from a batch of documents, with end-of-text after each document.

    A row of one token predicts nothing and is dropped.
    """
    texts = [text for text in batch["text"] if text and text.strip()]
    documents = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    for ids in documents:
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    if packing == "False":
        rows = [ids[:max_length] for ids in documents]
    else:
        stream = [token for ids in documents for token in ids]
        rows = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    columns = {"input_ids": rows}
    if packing == "documents":
        columns["document_lengths"] = lengths_in_rows(map(len, documents), max_length)
    is_kept = [len(row) > 1 for row in rows]
    return {name: list(compress(values, is_kept)) for name, values in columns.items()}


def lengths_in_rows(document_lengths: Iterable[int], max_length: int) -> list[list[int]]:
    """Cut documents, given by their lengths, into full rows. Return the lengths of the parts in
    each row.
    """
    rows, space = [], 0
    for length in document_lengths:
        while length:
            if not space:
                rows.append([])
                space = max_length
            rows[-1].append(min(length, space))
            length -= rows[-1][-1]
            space -= rows[-1][-1]
    return rows
