"""Runs that are killed or stopped, then resumed, end with the same student bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_pair
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train.checkpoints.atomic import INCOMPLETE, remove_old
from train.checkpoints.find import find_checkpoint
from train.train import main
from train.trainer import DistillationTrainer

NUM_STEPS = 40


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A GPT-2, whose student uses dropout, so random states matter."""
    return save_pair(tmp_path_factory.mktemp("gpt2"), "gpt2")[0]


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = [f"Document {i}: {' '.join(str(i * j) for j in range(i % 17))}" for i in range(3000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def command(teacher: Path, folder: Path, documents: Path, *flags: str) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": documents,
        "max_length": 32, "max_steps": NUM_STEPS, "logging_steps": 1, "save_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "disable_tqdm": True,
        "eval_strategy": "no", "bf16": False, "resume_from_checkpoint": "last",
        "measure_order": False,
    }  # fmt: skip
    return [*(str(x) for name, value in settings.items() for x in (f"--{name}", value)), *flags]


def run_until(num_lines: int, delay: float, sent: signal.Signals, words: list[str]) -> int:
    """Run the command and send the signal a moment after `num_lines` steps were logged. Return its
    exit status, which is 0 if it ended before.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "train.train", *words],
        cwd=ROOT,
        # As many threads as this process: sums over other numbers of threads round differently.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = 0
    for line in process.stdout:
        lines += line.startswith("{'loss'")
        if lines == num_lines:
            time.sleep(delay)
            process.send_signal(sent)
            break
    rest, _ = process.communicate(timeout=120)
    assert "Traceback" not in rest, rest
    return process.returncode


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "run.json").read_text())["log"]
    return [line["loss"] for line in log if "loss" in line]


def check_equal(folder: Path, reference: Path, num_steps: int = NUM_STEPS) -> None:
    assert losses(folder) == losses(reference)
    assert len(losses(folder)) == num_steps
    for name, tensor in weights(reference).items():
        assert torch.equal(weights(folder)[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["True", "False"])
@pytest.mark.parametrize(
    "signals", [[signal.SIGKILL, signal.SIGTERM], [signal.SIGKILL] * 5], ids=["both", "five"]
)
def test_killed_and_resumed_ends_as_if_never_killed(
    teacher, documents, tmp_path, streaming, signals
):
    flags = ["--streaming", streaming]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(teacher, whole, documents, *flags))
    for i, sent in enumerate(signals):
        status = run_until(
            random.randint(1, NUM_STEPS // len(signals) // 2),
            random.uniform(0, 0.3 / len(signals)),
            sent,
            command(teacher, killed, documents, *flags),
        )
        if status == 0 and i > 0:
            break  # ended before a later signal
        assert status == (-signal.SIGKILL if sent == signal.SIGKILL else 128 + signal.SIGTERM)
        assert not (killed / "config.json").exists()
    else:
        main(command(teacher, killed, documents, *flags))
    check_equal(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("num_whole_steps", [0, 2])
def test_a_step_interrupted_by_sigterm_is_discarded(
    teacher, documents, tmp_path, monkeypatch, num_whole_steps
):
    """The signal arrives between two micro-batches."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--streaming", "True", "--max_steps", "6"]
    main(command(teacher, whole, documents, *flags))
    compute_loss = DistillationTrainer.compute_loss
    calls = []

    def compute_loss_and_signal(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == num_whole_steps * 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss_and_signal)
    with pytest.raises(SystemExit) as ended:
        no_checkpoints = ["--save_strategy", "no", "--save_steps", "100"]
        main(command(teacher, stopped, documents, *flags, *no_checkpoints))
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(calls) == num_whole_steps * 4 + 2
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    assert checkpoint.name == f"checkpoint-{num_whole_steps}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    main(command(teacher, stopped, documents, *flags))
    check_equal(stopped, whole, num_steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["True", "False"])
def test_a_run_killed_after_its_last_step_only_saves(teacher, documents, tmp_path, streaming):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--streaming", streaming, "--max_steps", "2"]
    main(command(teacher, whole, documents, *flags))
    shutil.copytree(whole / "checkpoints", killed / "checkpoints")
    main(command(teacher, killed, documents, *flags))
    assert losses(killed) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name


def test_a_run_that_cannot_resume_from_a_checkpoint_says_so(
    teacher, documents, tmp_path, capsys, monkeypatch
):
    flags = ["--max_steps", "1", "--streaming"]
    main(command(teacher, tmp_path, documents, *flags, "True"))
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    for name in ("config.json", "model.safetensors"):  # as if the run had not finished
        (tmp_path / name).unlink()

    def refused(streaming: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(command(teacher, tmp_path, documents, *flags, streaming))
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
        return line

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
    assert "; its run read a stream, use the same --dataset" in refused("False")
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    assert "checkpoint-1: its run was sharded, use the same --fsdp_config" in refused("True")
    (checkpoint / "pytorch_model_fsdp_0").rmdir()
    state = checkpoint / "stream.json"
    shutil.copy(state, checkpoint / "stream_0_of_2.json")
    assert "each rank of its run, by an older version" in refused("True")
    for path in checkpoint.glob("stream*"):
        path.unlink()
    assert "checkpoint-1: its run did not read a stream" in refused("True")


def test_checkpoints_of_another_run_are_not_mixed_with_those_of_this_one(
    teacher, documents, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights load
    checkpoints = [tmp_path / name / "checkpoint-7" for name in ("shared", "elsewhere")]
    for checkpoint in checkpoints:
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    for resume in ("False", str(checkpoints[1])):
        flags = ["--output_dir", str(tmp_path / "shared"), "--resume_from_checkpoint", resume]
        with pytest.raises(SystemExit) as ended:
            main(command(teacher, tmp_path / "student", documents, *flags))
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
        assert f"output_dir={tmp_path / 'shared'}: it holds checkpoint-7 of an earlier run" in line
        assert "add --resume_from_checkpoint last to continue that, name another --output" in line
        assert checkpoints[0].is_dir() and not (tmp_path / "student").exists()


def test_only_finished_checkpoints_are_found(tmp_path):
    assert find_checkpoint(None, str(tmp_path)) is None
    assert find_checkpoint("last", str(tmp_path / "missing")) is None
    for name in ("checkpoint-5", "checkpoint-10", f"{INCOMPLETE}/checkpoint-15"):
        (tmp_path / name).mkdir(parents=True)
    assert find_checkpoint("True", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="no checkpoint there"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), str(tmp_path))
    (tmp_path / "checkpoint-5/trainer_state.json").write_text("{}")
    named = str(tmp_path / "checkpoint-5")
    assert find_checkpoint(named, str(tmp_path)) == named


def test_old_checkpoints_are_removed_except_the_best(tmp_path):
    for step in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-1", "checkpoint-3", "checkpoint-10",
    }  # fmt: skip
