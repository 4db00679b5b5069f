"""Text to rows of tokens: local files, a stream or a mixture, held-out documents, packing.

Documents are joined with the end-of-text token and cut into full rows. The rest of a batch of
documents becomes a shorter row, so no text is lost. Rows are padded only when they are batched. A
packed row records the lengths of its documents, or of their parts, unless they may see each other.

Local files are tokenized once, by the main process. A stream is tokenized during training (see
train.stream). A document's place among the rows depends on the seed alone, never on the number of
ranks or of processes that tokenize.
"""

from collections.abc import Iterable
from functools import partial
from itertools import compress
from typing import NamedTuple

from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from patching.files.columns import UnusableText
from patching.files.texts import load_documents
from train.chats.arguments import ChatArguments
from train.chats.phases import Phases
from train.chats.rows import load_rows_of_chats
from train.data_args import DEFAULT_SHUFFLE_BUFFER, DataArguments, Packing
from train.stream import (
    DOCUMENTS_PER_CHUNK,
    Columns,
    Cut,
    Documents,
    Mixture,
    Stream,
    TextStream,
    Workers,
)

ROW_COLUMNS = ("input_ids", "document_lengths", "labels")
"""What a row holds. The second column is only there if its documents do not see each other, and the
third only if not all of its tokens are to be predicted.
"""


class Share(NamedTuple):
    """Which part of the data a rank reads."""

    rank: int = 0
    world_size: int = 1


class Rows(NamedTuple):
    train: Dataset | Stream | Phases
    held_out: Dataset | None
    """Text, or chats where no text is held out."""
    held_out_chats: Dataset | None = None
    """Chats that are held out besides the text."""

    @property
    def is_stream(self) -> bool:
        return not isinstance(self.train, Dataset)


class Texts(NamedTuple):
    """The documents of `--dataset` in three parts, each given source by source."""

    train: list[Dataset | IterableDataset]
    held_out: list[Dataset | None]
    set_aside: list[Dataset | IterableDataset]
    """Documents that are neither trained on nor held out, to measure orders on."""


def split_texts(arguments: DataArguments, seed: int, num_set_aside: int) -> Texts:
    """Split each source. Held-out documents do not depend on the number of those set aside. With
    `--eval_dataset` none are held out.

    Raises ValueError as `load_rows` does.
    """
    sources = arguments.sources
    total = sum(source.weight for source in sources)
    parts = Texts([], [], [])
    for source in sources:

        def share(num_documents: int, weight: float = source.weight) -> int:
            return -int(-num_documents * weight // total)

        text = documents_of(arguments, source.name, len(sources) > 1)
        text, held_out = split_held_out(text, share(arguments.num_held_out), seed)
        parts.held_out.append(held_out)
        num_here = share(num_set_aside)
        if num_here and isinstance(text, IterableDataset):
            parts.set_aside.append(text.take(num_here))
            text = text.skip(num_here)
        elif num_here and len(text) > 1:
            text, set_aside = split_held_out(text, num_here, seed)
            parts.set_aside.append(set_aside)
        parts.train.append(text)
    return parts


def documents_set_aside(arguments: DataArguments, seed: int, num_set_aside: int) -> Documents:
    """Return the documents that are neither trained on nor held out, texts or lists of token ids.
    There are none if the text is a single document.
    """
    parts = split_texts(arguments, seed, num_set_aside).set_aside
    return [document["text"] for part in parts for document in part if document["text"]]


def load_phases(
    arguments: DataArguments,
    chats: ChatArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    num_steps: int,
    num_set_aside: int = 0,
) -> Rows:
    """Return the rows of text, then of chats, that a run of `num_steps` takes, and held-out rows of
    both. Without steps of text, only text of its own is held out (`--eval_dataset`).

    Raises ValueError as `load_rows` and `load_rows_of_chats` do.
    """
    num_text_steps = chats.num_text_steps(num_steps)
    text, held_out = None, None
    if num_text_steps:
        rows = load_rows(arguments, tokenizer, seed, num_set_aside, as_stream=True)
        text, held_out = rows.train, rows.held_out
    elif arguments.eval_dataset is not None:
        held_out = tokenize_held_out(given_held_out(arguments), arguments, tokenizer)
    stream, held_out_chats = load_rows_of_chats(chats, arguments, tokenizer, seed)
    phases = Phases(text, stream, num_text_steps, arguments.max_length)
    if held_out is None:
        return Rows(phases, held_out_chats)
    return Rows(phases, held_out, held_out_chats)


def load_rows(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    num_set_aside: int = 0,
    as_stream: bool = False,
) -> Rows:
    """Return rows to train on and held-out rows, each row `{"input_ids": [...]}` and, unless
    documents see each other, `document_lengths`. `num_set_aside` documents are in neither. With
    `as_stream`, local text is read as one, too.

    Raises ValueError if there is no text, no such column, or no file of a known kind.
    """
    cut = cut_of(arguments, tokenizer)
    sources = arguments.sources
    texts, samples, _ = split_texts(arguments, seed, num_set_aside)
    if arguments.eval_dataset is not None:
        held_out = given_held_out(arguments)
    else:
        held_out = concatenate_datasets(samples) if samples[0] is not None else None
    reads_files = not isinstance(texts[0], Dataset)
    if as_stream and not reads_files:
        texts = [texts[0].to_iterable_dataset()]
    if isinstance(texts[0], IterableDataset):
        workers = Workers(cut, arguments.tokenizer_processes)
        buffer = arguments.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER
        streams = [
            TextStream(source.name, text, workers, buffer, seed, reads_files)
            for source, text in zip(sources, texts)
        ]
        weights = [source.weight for source in sources]
        train = streams[0] if len(streams) == 1 else Mixture(streams, weights)
    else:
        if arguments.shuffle_buffer is not None:
            raise ValueError(
                "--shuffle_buffer is for streams, and all rows of local files are shuffled: leave "
                "it out, or add --streaming"
            )
        train = tokenize(texts[0], cut, arguments.tokenizer_processes)
        if len(train) == 0:
            raise ValueError(f"dataset={arguments.dataset}: there is no text in it")
    if held_out is not None:
        held_out = tokenize_held_out(held_out, arguments, tokenizer)
    return Rows(train, held_out)


def cut_of(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Cut:
    """Return a function that cuts documents into rows as the flags say."""
    return partial(
        rows_of_documents,
        tokenizer=tokenizer,
        max_length=arguments.max_length,
        packing=arguments.packing,
    )


def given_held_out(arguments: DataArguments) -> Dataset:
    """Return the documents of `--eval_dataset`."""
    documents = documents_of(arguments, arguments.eval_dataset)
    if isinstance(documents, IterableDataset):
        return _in_memory(documents.take(max(arguments.heldout_documents, 1)))
    return documents


def tokenize_held_out(
    documents: Dataset, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return held-out documents as rows. Raises ValueError if they hold no text."""
    rows = tokenize(documents, cut_of(arguments, tokenizer))
    if len(rows) == 0:
        raise ValueError(
            f"eval_dataset={arguments.eval_dataset or arguments.dataset}: the held-out "
            "documents are empty, give another --eval_dataset"
        )
    return rows


def documents_of(
    arguments: DataArguments, name: str, is_mixed: bool = False
) -> Dataset | IterableDataset:
    """Return documents in one column, `text`. A hub dataset and the parts of a mixture are always
    streamed, local files only with `--streaming`.
    """
    return load_documents(
        name,
        text_column=arguments.tokens_column or arguments.text_column,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
        streaming=arguments.streaming or is_mixed,
        holds_tokens=arguments.tokens_column is not None,
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


def tokenize(documents: Dataset, cut: Cut, num_processes: int = 1) -> Dataset:
    """Return documents as rows of token ids. Chunks are the same for any number of processes."""
    starts = Dataset.from_dict({"start": range(0, len(documents), DOCUMENTS_PER_CHUNK)})
    num_processes = min(num_processes, len(starts))
    return starts.map(
        _rows_from,
        batched=True,
        batch_size=1,
        remove_columns=["start"],
        num_proc=num_processes if num_processes > 1 else None,
        fn_kwargs={"documents": documents, "cut": cut},
    )


def _rows_from(batch: dict[str, list[int]], documents: Dataset, cut: Cut) -> Columns:
    (start,) = batch["start"]
    return cut(documents[start : start + DOCUMENTS_PER_CHUNK]["text"])


def rows_of_documents(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, max_length: int, packing: Packing
) -> Columns:
    """Return rows of token ids. Texts are tokenized, with end-of-text after each one and whatever
    the tokenizer puts before it. Lists of token ids are used as they are.

    A row of one token predicts nothing and is dropped. Raises UnusableText for token ids that the
    tokenizer does not have.
    """
    if isinstance(next(filter(None, documents), None), list):
        token_ids = [ids for ids in documents if ids]
        _check_token_ids(token_ids, len(tokenizer))
    else:
        token_ids = _tokenized(documents, tokenizer)
    if packing == "False":
        rows = [ids[:max_length] for ids in token_ids]
    else:
        stream = [token for ids in token_ids for token in ids]
        rows = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    columns = {"input_ids": rows}
    if packing == "documents":
        columns["document_lengths"] = lengths_in_rows(map(len, token_ids), max_length)
    is_kept = [len(row) > 1 for row in rows]
    return {name: list(compress(values, is_kept)) for name, values in columns.items()}


def _tokenized(texts: Documents, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [text for text in texts if text and text.strip()]
    documents = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    for ids in documents:
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    return documents


def _check_token_ids(documents: list[list[int]], num_tokens: int) -> None:
    for ids in documents:
        if min(ids) < 0 or max(ids) >= num_tokens:
            raise UnusableText(
                f"tokens_column: a document holds token ids {min(ids)} to {max(ids)}, and the "
                f"teacher's tokenizer has 0 to {num_tokens - 1}: tokenize the text with that one"
            )


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
