"""Calibration text: which documents are read, and how they become batches."""

import json

import pytest
import torch
from conftest import VOCAB_SIZE, byte_tokenizer
from transformers import LlamaConfig

from patching.arguments import CalibrationArguments
from patching.running.calibration import Calibration, padded_batches


def test_the_first_texts_are_read_and_blank_ones_skipped(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = ["alpha", " ", "", "beta", "gamma"]
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    flags = {"calibration": str(path), "calibration_column": "body"}
    text = CalibrationArguments(
        **flags, calibration_texts=2, calibration_length=4
    ).read_calibration()
    assert text.texts == ["alpha", "beta"]
    assert text.name == "the first 2 texts of texts.jsonl"
    assert text == Calibration.read(str(path), text_column="body", num_texts=2, length=4)
    for longest, length in ((128, 4), (3, 3)):
        config = LlamaConfig(max_position_embeddings=longest)
        (batch,) = text.batches(byte_tokenizer(), config)
        assert batch["input_ids"].shape == (2, length)
    other = CalibrationArguments(**flags, calibration_texts=3).read_calibration()
    assert other.sha256 != text.sha256
    after = Calibration.read(str(path), text_column="body", num_texts=2, skip=1)
    assert (after.texts, after.name) == (["beta", "gamma"], "texts 2-3 of texts.jsonl")
    with pytest.raises(ValueError, match="no text in it after its first 3"):
        CalibrationArguments(**flags, calibration_skip=3).read_calibration()
    with pytest.raises(ValueError, match="text_column=text: .* has the columns body"):
        CalibrationArguments(calibration=str(path)).read_calibration()


def test_plain_text_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\nline\n\ntwo\n")
    assert Calibration.read(str(path)).texts == ["one\nline", "two\n"]


def test_rows_are_padded_on_the_right():
    first, second = padded_batches([[1, 2, 3], [4], [5, 6], [7], [VOCAB_SIZE - 1]])
    assert first["input_ids"].tolist()[1] == [4, 0, 0]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert second["attention_mask"].equal(torch.ones(1, 1, dtype=torch.long))


def test_numbers_out_of_range_are_named():
    problems = CalibrationArguments(
        calibration_texts=0, calibration_length=1, calibration_skip=-1
    ).check_calibration()
    assert problems == [
        "calibration_texts=0: choose 1 or more",
        "calibration_skip=-1: choose 0 or more",
        "calibration_length=1: choose 2 or more",
    ]
