"""A training step for which there is not enough memory. For evaluation, which goes on with smaller
batches, see test_family_lm.py and test_generation.py.
"""

import re

import pytest
import torch
from conftest import save_pair
from safetensors.torch import load_file

from train.train import main
from train.trainer import DistillationTrainer

MESSAGES = {
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    ),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
}


def command(teacher, folder, dataset, *more: str) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 4, "logging_steps": 1, "warmup_steps": 0, "save_steps": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
        "disable_tqdm": True, "measure_order": False,
    }  # fmt: skip
    return [*(str(x) for name, value in settings.items() for x in (f"--{name}", value)), *more]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_training_says_what_takes_less_and_the_remedy_gives_the_same_student(
    device, text_file, tmp_path, monkeypatch, capsys
):
    teacher, _ = save_pair(tmp_path / "pair")
    whole, short = tmp_path / "whole", tmp_path / "short"
    main(command(teacher, whole, text_file))
    compute_loss, num_calls = DistillationTrainer.compute_loss, []

    def scarce(self, model, inputs, *args, **kwargs):
        num_calls.append(len(inputs["input_ids"]))
        if len(num_calls) > 2 and num_calls[-1] > 2:
            raise MESSAGES[device]
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", scarce)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command(teacher, short, text_file))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory in step 3: lower --per_device_train_batch_size")
    assert "now 4, and raise --gradient_accumulation_steps as much" in error
    (checkpoint,) = re.findall(r"--resume_from_checkpoint last continues from (.*)", error)
    assert checkpoint.endswith("checkpoint-2")
    assert not (short / "config.json").exists()

    remedy = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    main(command(teacher, short, text_file, *remedy, "--resume_from_checkpoint", "last"))
    found = load_file(short / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_other_errors_keep_their_traceback(text_file, tmp_path, monkeypatch):
    teacher, _ = save_pair(tmp_path / "pair")

    def fails(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(DistillationTrainer, "compute_loss", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(command(teacher, tmp_path / "student", text_file))
