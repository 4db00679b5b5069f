"""The same command on the same machine: the same student, order, sizes and report, byte for byte.

What records the run (run.json, provenance.json, stored results) has times, which are not compared,
and neither are the speeds and the folders' names in other files.
"""

import re
import socket
from pathlib import Path

import pytest
import torch
from killed import Command, ranks_of
from local_tasks import save_pair_and_tasks
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SPEED = re.compile(rb'"tokens_per_second": [^,]*,|(?<= )[\d,]+(?= \| \S+ [KM]B \|\n)')
"""In summary.json, and in the table of costs of summary.md."""

TWO_RANKS_NOISE = 1e-5
"""Largest difference between weights of one rank and of two, whose sums round differently."""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_pair_and_tasks(folder)
    return folder


def training(given: Path, folder: Path) -> list[object]:
    settings = {
        "teacher_model_name_or_path": given / "teacher", "dataset": given / "text.jsonl",
        "max_length": 32, "max_steps": 8, "save_strategy": "no", "eval_steps": 4, "bf16": False,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "disable_tqdm": True, "save_directory": folder, "seed": 3,
    }  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def run_all(given: Path, folder: Path) -> dict[str, bytes]:
    """Train, evaluate and save. Return the files, without those that record the run."""
    student = folder / "student"
    Command("train.train", training(given, student), folder / "log").finish()
    pair = ["--teacher_model_name_or_path", given / "teacher"]
    pair += ["--student_model_name_or_path", student]
    tasks = ["--tasks", "choice,generation", "--include_path", given / "tasks"]
    sweep = [*pair, *tasks, "--num_layers_to_patch", "all", "--dtype", "float32"]
    for module, words in (
        ("evaluate.evaluate", [*sweep, "--save_directory", folder / "results"]),
        ("patching.patch", [*pair, "--num_layers_to_patch", 1, "--save_directory", folder / "k1"]),
    ):
        Command(module, words, folder / "log").finish()
    records = ("run.json", "provenance.json", "family_k", "results_", "log", ".")
    return {
        str(path.relative_to(folder)): SPEED.sub(b"", path.read_bytes()).replace(
            str(folder).encode(), b""
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(records)
    }


def test_the_same_command_writes_the_same_files(given, tmp_path):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found.append(run_all(given, tmp_path / name))
    one, two = found
    expected = {"student/model.safetensors", "student/student_config.json", "results/summary.md"}
    assert expected | {"results/summary.csv", "k1/model.safetensors"} <= one.keys()
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_two_ranks_are_the_same_each_time_and_near_one(given, tmp_path):
    """A rank's micro-batches are half of those of the single process."""
    one = training(given, tmp_path / "one")
    Command("train.train", one, tmp_path / "log").finish()
    found = []
    for name in ("two", "again"):
        words = [*training(given, tmp_path / name), "--gradient_accumulation_steps", 1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in ranks_of(Command("train.train", words, tmp_path / "log"), port):
            rank.join()
            assert rank.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    alone, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    difference = max((alone[name] - shared[name]).abs().max().item() for name in alone)
    largest = max(tensor.abs().max().item() for tensor in alone.values())
    print(f"largest difference {difference:.1e} of weights up to {largest:.1e}")
    torch.testing.assert_close(alone, shared, rtol=0, atol=TWO_RANKS_NOISE)
