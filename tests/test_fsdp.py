"""Two CPU ranks under torchrun with real FSDP2 sharding, compared with one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_module, save_pair
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train.sharding import check_replicas
from train.train import main

TORCHRUN = ["torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
SHARDED = [*TORCHRUN, "tests/shard_on_cpu.py"]


def command(teacher: Path, folder: Path, dataset: Path, *flags: str) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 4, "logging_steps": 1, "warmup_steps": 0,
        "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "bf16": False,
        "measure_order": False,
    }  # fmt: skip
    return [*(str(x) for name, value in settings.items() for x in (f"--{name}", value)), *flags]


def train_sharded(*words: str, num_ranks: int = 2) -> None:
    launcher = [word.replace("=2", f"={num_ranks}") for word in SHARDED]
    done = run_module(*launcher, *words, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def read(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    log = json.loads((folder / "run.json").read_text())["log"]
    return [line for line in log if "loss" in line], load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("tying", ["tied", "untied"])
def test_two_sharded_ranks_follow_one_process(tying, text_file, tmp_path):
    teacher, _ = save_pair(tmp_path, f"qwen3-{tying}")
    one, at_once, two = (tmp_path / name for name in ("one", "at_once", "two"))
    main(command(teacher, one, text_file))
    whole_step = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    main(command(teacher, at_once, text_file, *whole_step))
    way = ("--fsdp", "True") if tying == "tied" else ("--fsdp_config", str(teacher))
    train_sharded(*command(teacher, two, text_file, "--gradient_accumulation_steps", "4", *way))

    reports = [json.loads((two / f"checkpoints/held_{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["read_weights"] for report in reports] == [True, False]
    if tying == "untied":  # once per step of four micro-batches
        assert [report["head_gathers"] for report in reports] == [4, 4]
    for name, num_layers in (("student", 4), ("teacher", 6)):
        shares = [report[name] for report in reports]
        assert len(shares[0]) >= 11 * num_layers
        for path, first, second in zip(shares[0], *(share.values() for share in shares)):
            if name == "teacher" and ".layers." not in path:
                continue  # its head, and what is gathered along with it, stays whole
            assert first["share"][0] + second["share"][0] == first["whole"][0]
            assert second["share"][0] < first["whole"][0]

    log, weights = read(one)
    assert len(log) == 4
    for folder in (at_once, two):
        other_log, other_weights = read(folder)
        assert len(other_log) == 4
        for line, expected in zip(other_log, log):
            for term in ("loss", "cross_entropy", "kl", "cosine", "grad_norm"):
                assert line[term] == pytest.approx(expected[term], rel=1e-5), term
        assert weights.keys() == other_weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-5)
    student = AutoModelForCausalLM.from_pretrained(two)
    assert student.config.tie_word_embeddings == (tying == "tied")


@pytest.mark.slow
def test_sharded_ranks_resume(text_file, tmp_path):
    teacher, _ = save_pair(tmp_path, "qwen3-tied")
    whole, again = tmp_path / "whole", tmp_path / "again"
    settings = [
        "--gradient_accumulation_steps", "4", "--fsdp_config", str(teacher),
        "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5",
    ]  # fmt: skip
    train_sharded(*command(teacher, whole, text_file, *settings))
    shutil.copytree(whole / "checkpoints/checkpoint-2", again / "checkpoints/checkpoint-2")
    settings += ["--resume_from_checkpoint", "last"]
    train_sharded(*command(teacher, again, text_file, *settings))
    (log, weights), (resumed_log, resumed_weights) = read(whole), read(again)
    assert [line["loss"] for line in resumed_log] == [line["loss"] for line in log]
    assert all(torch.equal(resumed_weights[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
def test_sharded_ranks_leave_a_checkpoint_on_sigterm(text_file, tmp_path):
    """SIGTERM to torchrun, as a cluster sends it."""
    teacher, _ = save_pair(tmp_path, "qwen3-tied")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = [
        "--gradient_accumulation_steps", "4", "--fsdp_config", str(teacher), "--max_steps", "12",
        "--streaming", "True", "--resume_from_checkpoint", "last",
    ]  # fmt: skip
    # A stream's first documents are held out, and there are more of them than in the file.
    documents = tmp_path / "documents.jsonl"
    documents.write_text(text_file.read_text() * 3)
    train_sharded(*command(teacher, whole, documents, *settings))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *SHARDED, *command(teacher, stopped, documents, *settings)],
        cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("{'loss'"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert "stopped by SIGTERM at step" in rest
    assert process.returncode != 0
    assert not (stopped / "config.json").exists()
    (checkpoint,) = (stopped / "checkpoints").glob("checkpoint-*")
    assert (checkpoint / "stream.json").exists()
    train_sharded(*command(teacher, stopped, documents, *settings))
    (log, weights), (resumed_log, resumed_weights) = read(whole), read(stopped)
    assert [line["loss"] for line in resumed_log] == [line["loss"] for line in log]
    assert all(torch.equal(resumed_weights[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
def test_compiled_and_sharded_with_activation_checkpointing(text_file, tmp_path):
    teacher, _ = save_pair(tmp_path, "qwen3-tied")
    one, two = tmp_path / "one", tmp_path / "two"
    main(command(teacher, one, text_file))
    once_per_step = {"sync_each_batch": False}
    train_sharded(
        *command(teacher, two, text_file, "--gradient_accumulation_steps", "4"),
        *("--fsdp_config", str(teacher), "--activation_checkpointing", "True"),
        *("--torch_compile", "True", "--torch_compile_backend", "aot_eager"),
        *("--accelerator_config", json.dumps({"gradient_accumulation_kwargs": once_per_step})),
    )
    (log, weights), (sharded_log, sharded_weights) = read(one), read(two)
    for line, expected in zip(sharded_log, log):
        for term in ("loss", "cross_entropy", "kl", "cosine", "grad_norm"):
            assert line[term] == pytest.approx(expected[term], rel=1e-4), term
    assert sharded_weights.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(sharded_weights[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_sharded_in_bf16_with_activation_checkpointing(text_file, tmp_path):
    teacher, _ = save_pair(tmp_path, "qwen3-untied")
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["--bf16", "True", "--max_steps", "2"]
    main(command(teacher, one, text_file, *settings))
    fsdp = [
        "--fsdp_config", str(teacher), "--gradient_accumulation_steps", "4",
        "--activation_checkpointing", "True",
    ]  # fmt: skip
    train_sharded(*command(teacher, two, text_file, *settings, *fsdp))
    (log, weights), (sharded_log, sharded_weights) = read(one), read(two)
    for line, expected in zip(sharded_log, log):
        for term in ("loss", "cross_entropy", "kl", "cosine"):
            assert line[term] == pytest.approx(expected[term], rel=0.02), term
    assert sharded_weights.keys() == weights.keys()
    assert all(tensor.dtype == torch.float32 for tensor in sharded_weights.values())


@pytest.mark.slow
def test_four_ranks_in_two_groups_follow_one_process(text_file, tmp_path):
    """Each group holds a whole copy of both models, sharded over its two ranks."""
    teacher, _ = save_pair(tmp_path, "qwen3-tied")
    one, four = tmp_path / "one", tmp_path / "four"
    settings = ["--max_steps", "2", "--heldout_documents", "2"]
    main(command(teacher, one, text_file, *settings))
    split = ["--gradient_accumulation_steps", "2", "--fsdp_config", str(teacher)]
    flags = [*settings, *split, "--fsdp_replicas", "2"]
    train_sharded(*command(teacher, four, text_file, *flags), num_ranks=4)
    reports = [
        json.loads((four / f"checkpoints/held_{rank}.json").read_text()) for rank in range(4)
    ]
    for name in ("student", "teacher"):
        shares = [report[name] for report in reports]
        for path, first, second, third, _ in zip(shares[0], *(s.values() for s in shares)):
            assert third["share"] == first["share"]
            if name == "teacher" and ".layers." not in path:
                continue  # its head, and what is gathered along with it, stays whole
            assert first["share"][0] + second["share"][0] == first["whole"][0]
    (log, weights), (sharded_log, sharded_weights) = read(one), read(four)
    for line, expected in zip(sharded_log, log, strict=True):
        for term in ("loss", "cross_entropy", "kl", "cosine", "grad_norm"):
            assert line[term] == pytest.approx(expected[term], rel=1e-4), term
        assert line["tokens_seen"] == expected["tokens_seen"]
    for name, tensor in weights.items():
        torch.testing.assert_close(sharded_weights[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("replicas", "ranks"), [(3, 4), (4, 4), (2, 3)])
def test_replicas_that_the_ranks_do_not_form_are_rejected(replicas, ranks):
    args = SimpleNamespace(fsdp=True, fsdp_replicas=replicas)
    with pytest.raises(ValueError, match=f"fsdp_replicas={replicas}: {ranks} ranks do not form"):
        check_replicas(args, ranks)
    check_replicas(SimpleNamespace(fsdp=True, fsdp_replicas=2), 4)
    with pytest.raises(ValueError, match="it needs --fsdp_config and ranks that shard"):
        check_replicas(SimpleNamespace(fsdp=None, fsdp_replicas=2), 4)
