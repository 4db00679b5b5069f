"""Dtypes that a device takes many times as long in."""

import warnings

import pytest
import torch

from patching import patch, similarity
from patching.devices import warn_if_slow
from train import cache_teacher, train


@pytest.fixture
def capability(monkeypatch):
    """The capability that the CPU says it has, which a test may change."""
    said = ["AVX2"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: said[0])
    return said


def test_half_precision_is_slow_on_a_cpu_without_avx512(capability):
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.warns(UserWarning, match="take many times as long as in fp32: try --x y"):
            warn_if_slow(cpu, dtype, "--x y")
    with warnings.catch_warnings(action="error"):
        warn_if_slow(cpu, torch.float32, "")
        warn_if_slow(torch.device("cuda"), torch.bfloat16, "")
        capability[0] = "AVX512"
        warn_if_slow(cpu, torch.bfloat16, "")


@pytest.mark.parametrize(
    ("main", "flags", "remedy"),
    [
        (train.main, "--save_directory OUT --dataset TEXT --max_steps 1 --max_length 16 "
                     "--gradient_accumulation_steps 1 --measure_order False "
                     "--save_strategy no", "--bf16 False"),
        (cache_teacher.main, "--teacher_cache OUT --dataset TEXT --max_rows 1 --max_length 16",
         "--bf16 False"),
        (similarity.main, "--student_model_name_or_path STUDENT --save_directory OUT "
                          "--calibration TEXT --calibration_texts 2 --dtype bfloat16",
         "--dtype float32"),
        (patch.main, "--student_model_name_or_path STUDENT --list "
                     "--order klpatch --calibration TEXT --calibration_texts 2 --dtype bfloat16",
         "the order.json of patching.orders --dtype float32"),
    ],
)  # fmt: skip
def test_commands_say_which_flag_helps(
    main, flags, remedy, capability, pair_folders, text_file, tmp_path
):
    paths = {"OUT": tmp_path / "out", "TEXT": text_file, "STUDENT": pair_folders[1]}
    words = [str(paths.get(word, word)) for word in flags.split()]
    with pytest.warns(UserWarning, match=f"as long as in fp32: try {remedy}"):
        main(["--teacher_model_name_or_path", str(pair_folders[0]), *words])
