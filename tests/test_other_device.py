"""On a device other than the CPU nothing is mixed up with tensors of the CPU, and numbers are the
same. The device is pretended, see `pretended_accelerator`.
"""

import json

import pytest
from conftest import run_module
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task

ON_OTHER_DEVICE = ("tests.pretended_accelerator",)


def numbers_of(folder) -> dict[str, float]:
    """Every metric of every task of every size."""
    return {
        f"{path.name} {task} {metric}": value
        for path in folder.glob("*_k*.json")
        for task, values in json.loads(path.read_text())["results"].items()
        for metric, value in values.items()
        if isinstance(value, float)
    }


@pytest.mark.slow
def test_sizes_are_evaluated_as_on_a_cpu(pair_folders, tmp_path):
    write_task(tmp_path, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(tmp_path, "choice", QUESTIONS, **CHOICE)
    write_task(tmp_path, "generation", QUESTIONS, **GENERATION)
    asked = {"num_layers_to_patch": "all", "include_path": tmp_path, "baselines": "naive"}
    found = []
    for runner in ((), ON_OTHER_DEVICE):
        words = flags(pair_folders, tmp_path / f"out{len(found)}", **asked)
        words += ["--tasks", "rolling,choice,generation"]
        done = run_module(*runner, "evaluate.evaluate", *words)
        assert done.returncode == 0, done.stderr
        found.append(numbers_of(tmp_path / f"out{len(found)}"))
    assert len(found[0]) > 20
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_an_order_is_searched_as_on_a_cpu(pair_folders, text_file, tmp_path):
    teacher, student = map(str, pair_folders)
    found = []
    for runner in ((), ON_OTHER_DEVICE):
        folder = tmp_path / f"out{len(found)}"
        done = run_module(
            *runner, "patching.orders", "--teacher_model_name_or_path", teacher,
            "--student_model_name_or_path", student, "--calibration", str(text_file),
            "--calibration_texts", "6", "--calibration_length", "12",
            "--save_directory", str(folder),
            "--dtype", "float32",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads((folder / "order_kl.json").read_text())["kl"])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_micro_batch_of_training_is_that_of_a_cpu(pair_folders):
    found = []
    for runner, device in (((), "cpu"), (ON_OTHER_DEVICE, "pretended")):
        done = run_module(*runner, "tests.micro_batch", *pair_folders, device)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert len(found[0]) > 20
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6)


def test_tensors_of_two_devices_do_not_mix(tmp_path):
    (tmp_path / "mixes.py").write_text(
        "import torch\nprint(torch.ones(2, device='pretended').sum().item())\n"
        "torch.ones(2, device='pretended') + torch.ones(2)\n"
    )
    done = run_module(*ON_OTHER_DEVICE, "mixes", PYTHONPATH=str(tmp_path))
    assert done.stdout == "2.0\n"
    assert "is on pretended:0" in done.stderr.splitlines()[-1]
