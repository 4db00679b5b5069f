"""`--load_best_model_at_end` saves the weights with the lowest held-out metric."""

import json

import pytest
import torch
from conftest import ROOT, run_module, save_pair
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train.train import main
from train.training_args import DistillationArguments

SHARDED = [
    "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2",
    "tests/shard_on_cpu.py",
]  # fmt: skip


def command(teacher, folder, dataset, *flags) -> list[str]:
    """A run whose held-out metrics rise after some steps: its learning rate is too high."""
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False,
        "gradient_accumulation_steps": 2, "learning_rate": 0.05, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "eval_steps": 1, "save_steps": 1, "disable_tqdm": True,
        "load_best_model_at_end": True, "save_total_limit": 10, "heldout_documents": 2,
        "measure_order": False,
    }  # fmt: skip
    words = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return [*words, *map(str, flags)]


def check_best(folder, metric: str) -> int:
    """Check that the saved student is the checkpoint with the lowest metric. Return its step."""
    run = json.loads((folder / "run.json").read_text())
    values = {line["step"]: line[metric] for line in run["log"] if metric in line}
    del values[0]  # before the first step there is no checkpoint
    best = min(values, key=values.get)
    assert run["student_step"] == best
    assert run["held_out"][metric] == values[best]
    assert len({*values.values()}) > 2
    return best


@pytest.mark.parametrize("metric", ["loss", "eval_kl"])
def test_the_student_is_the_best_checkpoint(pair_folders, text_file, tmp_path, metric):
    main(command(pair_folders[0], tmp_path, text_file, "--metric_for_best_model", metric))
    best = check_best(tmp_path, f"eval_{metric.removeprefix('eval_')}")
    assert best < 6 or metric == "loss"
    saved = load_file(tmp_path / "model.safetensors")
    kept = load_file(tmp_path / f"checkpoints/checkpoint-{best}/model.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_an_evaluation_whose_weights_are_not_saved_is_never_the_best(
    pair_folders, text_file, tmp_path
):
    main(command(pair_folders[0], tmp_path, text_file, "--save_steps", "3"))
    run = json.loads((tmp_path / "run.json").read_text())
    losses = {line["step"]: line["eval_loss"] for line in run["log"] if "eval_loss" in line}
    assert run["student_step"] == min((3, 6), key=losses.get)
    assert run["held_out"]["eval_loss"] == losses[run["student_step"]]


def test_a_resumed_run_saves_and_evaluates_as_its_flags_say(pair_folders, text_file, tmp_path):
    """Also with another metric: the best checkpoint is one of all that are there."""
    first = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--logging_steps", "4"]
    main(command(pair_folders[0], tmp_path, text_file, *first))
    (tmp_path / "config.json").unlink()  # as if it had not finished
    then = ["--save_steps", "1", "--eval_steps", "1", "--logging_steps", "1"]
    then += ["--max_steps", "8", "--resume_from_checkpoint", "last"]
    then += ["--metric_for_best_model", "kl"]
    main(command(pair_folders[0], tmp_path, text_file, *then))
    log = json.loads((tmp_path / "run.json").read_text())["log"]
    evaluated = {line["step"] for line in log if "eval_loss" in line}
    assert evaluated == {0, 2, 4, 5, 6, 7, 8}
    assert {line["step"] for line in log if "loss" in line} == {4, 5, 6, 7, 8}
    saved = {int(path.name[11:]) for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == evaluated - {0}
    check_best(tmp_path, "eval_kl")


def test_lower_is_better_and_metrics_are_known(tmp_path):
    def arguments(**flags):
        return DistillationArguments(save_directory=str(tmp_path), **flags)

    for metric in ("eval_kl", "cosine", "loss"):
        assert not arguments(metric_for_best_model=metric).greater_is_better
    with pytest.raises(ValueError, match="metric_for_best_model=accuracy: choose one of loss, cr"):
        arguments(metric_for_best_model="accuracy")
    with pytest.raises(ValueError, match="greater_is_better is not available"):
        arguments(greater_is_better=True)


def test_without_held_out_text_there_is_no_best_checkpoint(
    pair_folders, text_file, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        main(command(pair_folders[0], tmp_path, text_file, "--heldout_documents", "0"))
    assert ended.value.code == 2
    assert "load_best_model_at_end, metric_for_best_model: no text" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--save_total_limit", "1"],
        ["--save_steps", "2", "--save_total_limit", "2"],
        ["--save_strategy", "best", "--metric_for_best_model", "eval_kl", "--save_steps", "100"],
    ],
)
def test_sharded_ranks_load_the_best_checkpoint(text_file, tmp_path, flags):
    teacher, _ = save_pair(tmp_path, "qwen3-tied")
    folders = [tmp_path / "one", tmp_path / "two"]
    main(command(teacher, folders[0], text_file, *flags))
    words = command(teacher, folders[1], text_file, "--gradient_accumulation_steps", "1", *flags)
    done = run_module(
        *SHARDED, *words, "--fsdp_config", str(teacher), OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT), timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "run.json").read_text()) for folder in folders)
    assert one["student_step"] == two["student_step"]
    assert one["held_out"] == pytest.approx(two["held_out"], rel=1e-3)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
