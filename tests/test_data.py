"""Text to rows: every document once, held-out text is separate, padding is never a target."""

import json

import pytest
import torch
from conftest import VOCAB_SIZE, byte_tokenizer
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from train.batches import collate
from train.data import documents_of, load_rows, rows_of_documents, split_held_out
from train.data_args import DataArguments
from train.loss import IGNORED_LABEL, NO_TARGET, count, targets_at

EOS = VOCAB_SIZE - 1
TOKENIZER = byte_tokenizer()


def tokens_of(rows) -> list[int]:
    return [token for row in rows for token in row["input_ids"]]


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12), st.integers(2, 40))
def test_packed_rows_hold_every_document_once_in_order(texts, max_length):
    documents = [[*TOKENIZER(text)["input_ids"], EOS] for text in texts if text.strip()]
    stream = [token for document in documents for token in document]
    starts = [start for document in documents for start in (True, *[False] * (len(document) - 1))]
    if len(stream) % max_length == 1:
        stream.pop()  # a row of one token predicts nothing
    for packing in ("documents", "cross"):
        columns = rows_of_documents(texts, TOKENIZER, max_length, packing)
        rows = columns["input_ids"]
        assert [token for row in rows for token in row] == stream
        assert all(len(row) == max_length for row in rows[:-1])
    assert "document_lengths" not in columns
    lengths = rows_of_documents(texts, TOKENIZER, max_length, "documents")
    for i, (row, parts) in enumerate(zip(rows, lengths["document_lengths"], strict=True)):
        first = i * max_length
        ends = [first + sum(parts[: n + 1]) for n in range(len(parts))]
        cut = {first, *(j for j in range(first, first + len(row)) if starts[j])}
        assert {first, *ends} == cut | {first + len(row)}


def test_unpacked_rows_are_documents_cut_to_length():
    rows = rows_of_documents(["abcdef", "", None, "xy"], TOKENIZER, 4, packing="False")
    assert rows["input_ids"] == [
        TOKENIZER("abcd")["input_ids"],
        [*TOKENIZER("xy")["input_ids"], EOS],
    ]


def test_end_of_text_is_a_target_even_if_it_is_the_padding_token():
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == EOS
    batch = collate([{"input_ids": [1, 2, EOS, 3, EOS]}, {"input_ids": [4, EOS]}])
    assert batch["labels"].tolist() == [[1, 2, EOS, 3, EOS], [4, EOS, *[IGNORED_LABEL] * 3]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]


def test_documents_of_a_row_have_their_own_positions_and_no_target_across_them():
    batch = collate(
        [
            {"input_ids": [1, 2, EOS, 3, EOS], "document_lengths": [3, 2]},
            {"input_ids": [4, EOS], "document_lengths": [2]},
        ]
    )
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert targets_at(batch["labels"], is_masked_model=False).tolist() == [
        [2, EOS, NO_TARGET, EOS, IGNORED_LABEL],
        [EOS, *[IGNORED_LABEL] * 4],
    ]
    assert "attention_mask" not in batch
    assert count(batch["labels"]) == (4, 7)


def test_full_rows_have_no_mask():
    assert "attention_mask" not in collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])


def write(folder, kind):
    texts = [f"text number {i}" for i in range(20)]
    if kind == "txt":
        path = folder / "a.txt"
        path.write_text("\n \n".join(texts) + "\n")
    elif kind == "folder of txt":
        path = folder / "texts"
        path.mkdir()
        for i in range(4):
            (path / f"{i}.txt").write_text("\n\n\n".join(texts[5 * i : 5 * i + 5]))
        (path / "notes.md").write_text("not data")
    elif kind == "jsonl":
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    else:
        path = folder / "a.parquet"
        Dataset.from_dict({"text": texts, "id": [0] * 20}).to_parquet(path)
    return path, texts


@pytest.mark.parametrize("kind", ["txt", "folder of txt", "jsonl", "parquet"])
def test_local_files_of_every_kind(tmp_path, kind):
    path, texts = write(tmp_path, kind)
    documents = documents_of(DataArguments(), str(path))
    assert [text.strip() for text in documents["text"]] == texts


def test_held_out_documents_are_never_trained_on(text_file):
    arguments = DataArguments(dataset=str(text_file), max_length=16)
    rows = load_rows(arguments, TOKENIZER, seed=0)
    documents = documents_of(arguments, str(text_file))["text"]
    train, held_out = (
        TOKENIZER.decode(tokens_of(part)).removesuffix("<eos>").split("<eos>")
        for part in (rows.train, rows.held_out)
    )
    assert len(held_out) == 4  # a tenth of forty
    assert sorted([*train, *held_out]) == sorted(documents)
    again = load_rows(arguments, TOKENIZER, seed=0)
    assert tokens_of(again.held_out) == tokens_of(rows.held_out)


def test_a_streams_first_documents_are_held_out():
    stream = IterableDataset.from_generator(lambda: ({"text": f"document {i}"} for i in range(30)))
    train, held_out = split_held_out(stream, 5, seed=0)
    assert held_out["text"] == [f"document {i}" for i in range(5)]
    assert [row["text"] for row in train] == [f"document {i}" for i in range(5, 30)]


def test_separate_text_can_be_held_out(text_file, tmp_path):
    path, texts = write(tmp_path, "jsonl")
    arguments = DataArguments(dataset=str(text_file), eval_dataset=str(path), max_length=64)
    rows = load_rows(arguments, TOKENIZER, seed=0)
    assert TOKENIZER.decode(tokens_of(rows.held_out)) == "".join(f"{text}<eos>" for text in texts)


@pytest.mark.parametrize(
    ("content", "name", "changes", "message"),
    [
        ("", "a.jsonl", {}, "there is no text in it"),
        ('{"text": "cut off', "a.jsonl", {}, "dataset=.*a.jsonl cannot be read as json: "),
        (
            '{"text": ""}\n{"text": " "}\n',
            "a.jsonl",
            {"heldout_documents": 0},
            "there is no text in it",
        ),
        ('{"body": "x"}\n', "a.jsonl", {}, "text_column=text: .* has the columns body, choose one"),
        ("x", "a.doc", {}, "name a .txt, .jsonl, .csv or .parquet file"),
        ('{"text": "one"}\n', "a.jsonl", {}, "a single document, so none can be held out"),
    ],
)
def test_unusable_text_is_rejected(tmp_path, content, name, changes, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(DataArguments(dataset=str(path), **changes), TOKENIZER, seed=0)


def test_batches_are_padded_to_their_longest_row():
    batch = collate([{"input_ids": [1]}, {"input_ids": [1, 2, 3]}])
    assert batch["input_ids"].shape == (2, 3)
    assert batch["input_ids"].dtype == torch.long
