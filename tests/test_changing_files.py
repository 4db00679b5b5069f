"""Files that change or vanish while a command reads them, and clocks that go back."""

import json
import os
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from chat_runs import save_chat_teacher, write_chats
from conftest import save_pair
from safetensors.torch import load_file

from patching.orders.__main__ import main as search_orders
from train.stream import TextStream
from train.train import main


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"Text {i} about {'. ' * (i % 13)}"}) for i in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(teacher: Path, folder: Path, text: Path | str, *more: str) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": text,
        "max_length": 32, "max_steps": 12, "logging_steps": 1, "save_steps": 1, "bf16": False,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "disable_tqdm": True,
        "measure_order": False, "heldout_documents": 4, "resume_from_checkpoint": "last",
    }  # fmt: skip
    return [*(str(x) for name, value in settings.items() for x in (f"--{name}", value)), *more]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def remove(path: Path) -> None:
    path.unlink()


def cut_in_a_line(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def rewrite_with_its_time(path: Path) -> None:
    before = path.stat()
    path.write_text(path.read_text().replace("about", "above"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(remove, marks=pytest.mark.slow),
        pytest.param(cut_in_a_line, marks=pytest.mark.slow),
        rewrite_with_its_time,
    ],
)
def test_a_stream_that_changes_ends_the_run_and_what_was_saved_is_good(
    change, teacher, text, tmp_path, monkeypatch, capsys
):
    """It changes as its second pass begins."""
    content = text.read_bytes()
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    main(command(teacher, whole, text, "--streaming", "True"))
    read_block = TextStream._read_block
    num_blocks = []

    def changes(self, reader):
        num_blocks.append(1)
        if len(num_blocks) == 4:  # the first two are those of a check and of the first pass
            change(text)
        return read_block(self, reader)

    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "_read_block", changes)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(command(teacher, changed, text, "--streaming", "True"))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"dataset={text}: its files changed while they were read" in error
    assert "--resume_from_checkpoint last continues from" in error
    assert not (changed / "config.json").exists()
    text.write_bytes(content + content)
    with pytest.raises(SystemExit):
        main(command(teacher, changed, text, "--streaming", "True"))
    assert f"stream_bytes was [{len(content)}] and is" in capsys.readouterr().err
    text.write_bytes(content)
    main(command(teacher, changed, text, "--streaming", "True"))
    assert same_weights(changed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["one.jsonl", "other.jsonl", "chats.jsonl"])
def test_no_run_resumes_with_another_file_of_a_mixture_or_other_chats(
    changed, text, tmp_path, capsys
):
    """The file is longer than before."""
    paths = {name: tmp_path / name for name in ("one.jsonl", "other.jsonl", "chats.jsonl")}
    shutil.copy(text, paths["one.jsonl"])
    shutil.copy(text, paths["other.jsonl"])
    chats = write_chats(paths["chats.jsonl"])
    teacher, out = save_chat_teacher(tmp_path / "pair"), tmp_path / "out"
    mixture = f"{paths['one.jsonl']}=2,{paths['other.jsonl']}=1"
    words = command(teacher, out, mixture, "--sft_dataset", str(chats), "--max_steps", "2")
    main(words)
    (out / "config.json").unlink()  # as if it had not finished
    capsys.readouterr()
    with paths[changed].open("a") as file:
        file.write(paths[changed].read_text().splitlines()[0] + "\n")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "stream_bytes was [" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_training_with_a_clock_and_times_that_go_back(teacher, text, tmp_path, monkeypatch):
    """The newest checkpoint is the one of most steps, whatever the times say."""
    whole, back = tmp_path / "whole", tmp_path / "back"
    main(command(teacher, whole, text))
    clock = count(10**9, -60)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    few = ("--save_total_limit", "3")
    main(command(teacher, back, text, *few))
    kept = sorted((back / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
    for age, folder in enumerate(kept):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (10**9 - age, 10**9 - age))
    shutil.rmtree(kept[-1])
    (back / "config.json").unlink()
    main(command(teacher, back, text, *few))
    assert same_weights(back, whole)


def test_a_search_knows_its_text_by_its_content(teacher, text, tmp_path, capsys):
    """What is stored of a search belongs to the content of its text, not to its time."""
    pair = [
        *("--teacher_model_name_or_path", str(teacher)),
        *("--student_model_name_or_path", str(teacher.parent / "student")),
    ]
    words = [*pair, "--calibration", str(text), "--dtype", "float32", "--match_scale", "False"]
    words += ["--save_directory", str(tmp_path / "order")]
    search_orders(words)
    rewrite_with_its_time(text)
    with pytest.raises(SystemExit):
        search_orders(words)
    assert "was measured with text_sha256=" in capsys.readouterr().err
