"""A run whose numbers are no longer finite stops, keeps what was good, and never looks finished."""

import json

import pytest
import torch
from conftest import ROOT, run_module, save_pair
from training_runs import copy_with_nan, trainer_for

from train.checkpoints.find import find_checkpoint
from train.divergence import Diverged
from train.train import main

TWO_RANKS = ["torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]


def command(teacher, folder, dataset, *flags: str) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 6, "logging_steps": 1, "warmup_steps": 0, "save_steps": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
        "disable_tqdm": True, "eval_strategy": "no", "measure_order": False,
    }  # fmt: skip
    return [*(str(x) for name, value in settings.items() for x in (f"--{name}", value)), *flags]


def test_a_run_that_diverges_fails_and_keeps_the_last_good_checkpoint(
    pair_folders, text_file, tmp_path, capsys
):
    good = command(pair_folders[0], tmp_path, text_file, "--max_steps", "2")
    main(good)
    for name in ("config.json", "model.safetensors", "run.json"):
        (tmp_path / name).unlink()
    capsys.readouterr()
    resumed = ["--resume_from_checkpoint", "last", "--learning_rate", "1e20"]
    with pytest.raises(SystemExit) as ended:
        main(command(pair_folders[0], tmp_path, text_file, *resumed))
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert "step 4: the loss" in output.err
    last_good = tmp_path / "checkpoints" / "checkpoint-2"
    assert f"the last good checkpoint is {last_good}" in output.err
    assert "student saved" not in output.out
    assert "'loss': '0'" not in output.out
    assert not (tmp_path / "config.json").exists()
    state = json.loads((last_good / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_what_led_to_a_divergence_is_set_aside(pair_folders, text_file, tmp_path, capsys):
    """The loss that is named is the step's own, not the sum since the last line of the log."""
    with pytest.raises(SystemExit) as ended:
        flags = ["--learning_rate", "1e20", "--logging_steps", "9"]
        main(command(pair_folders[0], tmp_path, text_file, *flags))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    aside = tmp_path / "checkpoints" / "checkpoint-1.diverged"
    assert f"there is no good checkpoint, {aside} led to this step. Try a lower" in error
    assert [path.name for path in aside.parent.iterdir()] == [aside.name]
    assert find_checkpoint("last", str(aside.parent)) is None


def test_the_loss_of_a_step_is_its_own(tmp_path):
    trainer, losses = trainer_for(tmp_path, logging_steps=9), []
    trainer.model.lm_head.weight.register_hook(
        lambda gradient: gradient * (float("inf") if trainer.state.global_step == 2 else 1)
    )
    compute_loss = trainer.compute_loss

    def record(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append((trainer.state.global_step, float(loss.detach())))
        return loss

    trainer.compute_loss = record
    with pytest.raises(Diverged) as stopped:
        trainer.train()
    own = sum(loss for step, loss in losses if step == 2)
    assert len({step for step, _ in losses}) == 3
    assert (
        f"step 3: the loss or its gradients are not finite (on this rank the loss is {own:g}"
        in (str(stopped.value))
    )


def test_a_teacher_that_is_not_finite_is_to_blame(pair_folders, text_file, tmp_path, capsys):
    copy_with_nan(pair_folders[0], tmp_path / "teacher")
    with pytest.raises(SystemExit):
        main(command(tmp_path / "teacher", tmp_path / "s", text_file))
    error = capsys.readouterr().err
    assert "no step had been taken, so check the weights of the teacher" in error
    assert "learning_rate" not in error


def test_gradients_that_are_not_finite_change_no_weights(tmp_path):
    trainer = trainer_for(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(Diverged, match="step 1: .*gradient norm is inf"):
        trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = trainer_for(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = float("nan")
    with pytest.raises(Diverged, match="weights are not finite"):
        trainer.save_student(tmp_path / "student", torch.float32)
    assert not (tmp_path / "student").exists()
    with pytest.raises(Diverged, match="eval_loss is nan"):
        trainer.evaluate()


@pytest.mark.slow
def test_two_ranks_stop_together(text_file, tmp_path):
    """Only one of them has a loss that is not finite."""
    teacher, _ = save_pair(tmp_path, "qwen3-tied")
    for launcher in (
        [*TWO_RANKS, "--module", "train.train"],
        [*TWO_RANKS, "tests/shard_on_cpu.py"],
    ):
        folder = tmp_path / launcher[-1].replace("/", "_")
        words = command(teacher, folder, text_file, "--learning_rate", "1e20")
        done = run_module(
            *launcher, *words, "--fsdp_config", str(teacher), OMP_NUM_THREADS="1",
            PYTHONPATH=str(ROOT),
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("error: step 2: the loss") == 1, done.stderr
        assert not (folder / "config.json").exists()
