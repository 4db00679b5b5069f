"""What strangers' files must not do: run code, reach outside their folder, or carry secrets away.

docs/robustness.md lists these tests, and those of other files that belong to the subject.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, save_pair
from local_tasks import CHOICE, QUESTIONS, flags, write_task
from transformers import AutoModelForCausalLM

from evaluate.evaluate import main as evaluate
from patching.orders.__main__ import main as orders
from patching.patch import main as patch
from patching.similarity import main as similarity
from train.cache_teacher import main as cache_teacher
from train.train import main as train


class Runs:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_pair(folder)
    lines = [json.dumps({"text": f"Text {i} about {'.' * i}"}) for i in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tasks").mkdir()
    write_task(folder / "tasks", "choice", QUESTIONS, **CHOICE)
    return folder


@pytest.fixture
def here(original, tmp_path, monkeypatch) -> Path:
    copy = shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(copy)
    return copy


PATCH = ["--teacher_model_name_or_path", "teacher", "--student_model_name_or_path", "student",
         "--num_layers_to_patch", "1"]  # fmt: skip


def training(folder: str, *more: str) -> list[str]:
    settings = {
        "teacher_model_name_or_path": "teacher", "dataset": "text.jsonl", "max_length": 32,
        "max_steps": 2, "save_steps": 1, "bf16": False, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "disable_tqdm": True, "save_directory": folder,
        "measure_order": False,
    }  # fmt: skip
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)] + [
        *more
    ]


def test_pickles_next_to_safetensors_are_never_read(here):
    """Not those of weights, of optimizers, or of training arguments."""
    for parent in ("teacher", "student"):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pt"):
            torch.save({"x": Runs(here / "ran")}, here / parent / name)
    patch([*PATCH, "--save_directory", "out"])
    train(training("trained"))
    assert not (here / "ran").exists()
    assert not list((here / "out").glob("*.bin")) + list((here / "out").glob("*.pt"))


@pytest.mark.slow
def test_a_checkpoint_with_code_in_it_is_not_run(here):
    words = training("trained", "--save_total_limit", "2")
    train(words)
    shutil.rmtree("trained/checkpoints/checkpoint-2")
    for path in Path("trained").glob("*.*"):
        path.unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        path = Path("trained/checkpoints/checkpoint-1", name)
        good = path.read_bytes()
        torch.save({"state": Runs(here / "ran"), "param_groups": []}, path)
        with pytest.raises(Exception, match=r"[Ww]eights.only"):
            train([*words, "--resume_from_checkpoint", "last"])
        assert not (here / "ran").exists()
        path.write_bytes(good)
    train([*words, "--resume_from_checkpoint", "last"])


def auto_map(name: str) -> dict[str, Any]:
    return {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, f"{name}.Own"]}}


@pytest.mark.parametrize("name", ["../outside", "/{here}/outside", "sub/../../outside"])
def test_code_of_a_tokenizer_outside_its_folder_is_not_copied(name, here, capsys):
    (here / "outside.py").write_text("x = 1\n")
    (here / "teacher/sub").mkdir()
    path = here / "teacher/tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | auto_map(name.format(here=str(here)[1:])))
    )
    with pytest.raises(SystemExit, match="2"):
        patch([*PATCH, "--save_directory", "deep/er/out"])
    assert "which is not in its folder" in capsys.readouterr().err
    assert not (here / "deep").exists()


def test_code_that_imports_from_elsewhere_is_not_copied(here, capsys):
    (here / "outside.py").write_text("x = 1\n")
    path = here / "teacher/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | auto_map("own")))
    (here / "teacher/own.py").write_text('"""\nfrom ./../../outside import x\n"""\n')
    with pytest.raises(SystemExit, match="2"):
        patch([*PATCH, "--save_directory", "deep/er/out"])
    assert "which is not in its folder" in capsys.readouterr().err
    assert not (here / "deep").exists()


def into_links(folder: Path, names: list[str], target: Path) -> None:
    """Fill a folder with links to files of somebody else's."""
    folder.mkdir()
    target.mkdir()
    for name in names:
        (target / name).write_text('{"of": "the cache"}')
        (folder / name).symlink_to(target / name)


def untouched(target: Path) -> bool:
    return {path.read_text() for path in target.iterdir()} == {'{"of": "the cache"}'}


@pytest.mark.slow
def test_nothing_is_written_through_links_into_a_cache(here):
    """An output folder may hold links into a cache of the hub, as a downloaded model's does."""
    cache = here.parent
    measured = ["--calibration", "text.jsonl", "--dtype", "float32"]
    into_links(here / "orders", ["order.json", "kl.png"], cache / "1")
    orders([*PATCH[:4], *measured, "--save_directory", "orders"])
    into_links(
        here / "similar", ["similarity.json", "similarity.md", "similarity.png"], cache / "2"
    )
    similarity([*PATCH[:4], *measured, "--save_directory", "similar"])
    names = ["tokenizer.json", "model.safetensors", "README.md", "run.json", "loss.png",
             "generation_config.json", "student_config.json"]  # fmt: skip
    into_links(here / "trained", names, cache / "3")
    train(training("trained"))
    into_links(here / "results", ["summary.md", "summary.json", "summary.png"], cache / "4")
    values = {"tasks": "choice", "include_path": "tasks"}
    evaluate(flags(("teacher", "student"), "results", **values))
    for i in range(1, 5):
        assert untouched(cache / str(i)), i
    AutoModelForCausalLM.from_pretrained("trained")
    assert not Path("trained/model.safetensors").is_symlink()


def test_a_model_is_not_saved_among_links(here, capsys):
    into_links(here / "out", ["config.json"], here.parent / "cache")
    with pytest.raises(SystemExit, match="2"):
        patch([*PATCH, "--save_directory", "out"])
    assert "is not empty" in capsys.readouterr().err
    assert untouched(here.parent / "cache")


SECRET = "hf_" + "Secret" * 6


@pytest.mark.slow
def test_no_token_is_in_anything_written_or_printed(here, capsys, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(here / "token"))
    patch([*PATCH, "--save_directory", "out"])
    train(training("trained"))
    text = ["--dataset", "text.jsonl", "--max_length", "32", "--bf16", "False"]
    cache_teacher([*PATCH[:2], *text, "--teacher_cache", "cached"])
    values = {"tasks": "choice", "include_path": "tasks", "log_samples": True}
    evaluate(
        [word for word in flags(("teacher", "student"), "results", **values) if word != "True"]
    )
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    files = [path for path in here.rglob("*") if path.is_file()]
    assert {path.parts[len(here.parts)] for path in files} >= {
        "out",
        "trained",
        "cached",
        "results",
    }
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_chat_template_cannot_reach_outside_its_sandbox(here):
    """transformers renders templates in a sandbox. Templates come with a downloaded tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
