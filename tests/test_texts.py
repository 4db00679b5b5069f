"""Calibration text: the first documents of what the flags name."""

import json

import pytest
import torch
from conftest import VOCAB_SIZE, byte_tokenizer
from transformers import LlamaConfig

from patching.arguments import CalibrationArguments
from patching.files.texts import num_found_in
from patching.running.calibration import Calibration, padded_batches


def test_the_first_texts_are_read_and_blank_ones_passed_over(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = ["alpha", " ", "", "beta", "gamma"]
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    settings = {"calibration": str(path), "calibration_column": "body"}
    text = Calibration.read(
        CalibrationArguments(**settings, calibration_texts=2, calibration_length=4)
    )
    assert text.texts == ["alpha", "beta"]
    assert text.name == "the first 2 texts of texts.jsonl"
    for longest, length in ((128, 4), (3, 3)):
        config = LlamaConfig(max_position_embeddings=longest)
        (batch,) = text.batches(byte_tokenizer(), config)
        assert batch["input_ids"].shape == (2, length)
    other = Calibration.read(CalibrationArguments(**settings, calibration_texts=3))
    assert other.sha256 != text.sha256
    behind = Calibration.read(
        CalibrationArguments(**settings, calibration_texts=2, calibration_skip=1)
    )
    assert (behind.texts, behind.name) == (["beta", "gamma"], "texts 2-3 of texts.jsonl")
    with pytest.raises(ValueError, match="no text in it behind its first 3"):
        Calibration.read(CalibrationArguments(**settings, calibration_skip=3))
    with pytest.raises(ValueError, match="text_column=text: .* has the columns body"):
        Calibration.read(CalibrationArguments(calibration=str(path)))


def test_documents_of_plain_text_are_apart_by_blank_lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\nline\n\ntwo\n")
    assert Calibration.read(CalibrationArguments(str(path))).texts == ["one\nline", "two\n"]


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


def test_texts_are_found_however_they_are_cut():
    lines = [f"line {i} is long enough that no other text has it too" for i in range(9)]
    others = ["\n".join(lines[:4]), f"  {lines[4]}\n\n{lines[5]}", "a short one", "# Licence"]
    texts = {
        "\n".join(lines[2:5]): True,
        "\n".join(["# Licence", *lines[6:8]]): False,  # short lines prove nothing
        "\n".join(lines[5:7]): True,
        "\n".join(lines[5:8]): False,  # less than half
        " a short one": True,
        "another short one": False,
    }
    for text, is_found in texts.items():
        assert num_found_in([text], others) == is_found
    assert num_found_in(texts, others) == 3
