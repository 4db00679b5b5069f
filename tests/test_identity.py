"""A checkpoint says what made it: runs with other settings are refused."""

import json
import shutil
import warnings

import pytest
from conftest import save_pair
from datasets import Dataset, concatenate_datasets

from patching.blocks import LayerMap
from train.checkpoints.identity import FILE_NAME, differences, run_settings, text_settings
from train.data import Rows
from train.data_args import DataArguments
from train.train import main

SAVED = ("config.json", "model.safetensors")


def command(teacher, folder, dataset, *flags) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "eval_strategy": "no", "bf16": False,
        "resume_from_checkpoint": "last", "disable_tqdm": True,
    }  # fmt: skip
    words = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return [*words, *map(str, flags)]


@pytest.fixture(scope="module")
def stopped(pair_folders, text_file, tmp_path_factory):
    """A folder with the checkpoint of a run that did not finish."""
    folder = tmp_path_factory.mktemp("stopped")
    main(command(pair_folders[0], folder, text_file))
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    return folder


def error_of(capsys, words: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def test_a_run_with_other_settings_is_refused_with_every_difference(
    stopped, pair_folders, text_file, tmp_path, capsys
):
    teacher, text = pair_folders[0], text_file

    def refused(*flags) -> str:
        return error_of(capsys, command(teacher, stopped, text, *flags))

    assert "kept_layers was [0, 2, 4, 5] and is [0, 1, 5]" in refused("--kept_layers", "0,1,5")
    several = refused("--temperature", "2", "--seed", "1", "--gradient_accumulation_steps", "1")
    for name, before, now in (("temperature", 1.0, 2.0), ("seed", 0, 1), ("rows_per_step", 8, 4)):
        assert f"{name} was {before} and is {now}" in several
    assert "max_length was 32 and is 16" in refused("--max_length", "16")
    assert "text was" in refused("--heldout_documents", "1")
    assert "order_documents was 64 and is 7" in refused("--order_documents", "7")
    teacher = save_pair(tmp_path, "qwen3-untied")[0]
    assert "teacher was" in refused()


@pytest.mark.slow
def test_an_older_checkpoint_resumes_with_a_warning(stopped, pair_folders, text_file, tmp_path):
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/checkpoint-2" / FILE_NAME).unlink()
    with pytest.warns(UserWarning, match="it does not record what made it"):
        main(command(pair_folders[0], tmp_path, text_file))
    assert (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_what_may_change_does_and_a_new_learning_rate_is_announced(
    stopped, pair_folders, text_file, tmp_path, capsys
):
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    moved = shutil.copy(text_file, tmp_path / "moved.jsonl")
    changed = ["--max_steps", "4", "--learning_rate", "1e-5", "--eval_strategy", "steps"]
    changed += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main(command(pair_folders[0], tmp_path, moved, *changed))
    output = capsys.readouterr().out
    assert "learning_rate was 0.0003 and is 1e-05 from here on" in output
    assert "max_steps was 2 and is 4 from here on" in output
    log = json.loads((tmp_path / "run.json").read_text())["log"]
    rates = [line["learning_rate"] for line in log if "loss" in line]
    assert len(rates) == 4
    assert 0 < rates[2] < 1e-5  # step 3 of the new schedule


@pytest.mark.slow
def test_a_checkpoint_of_the_model_alone_is_refused(
    stopped, pair_folders, text_file, tmp_path, capsys
):
    main(command(pair_folders[0], tmp_path, text_file, "--save_only_model", "True"))
    for name in SAVED:
        (tmp_path / name).unlink()
    error = error_of(capsys, command(pair_folders[0], tmp_path, text_file))
    assert "it holds only the model (--save_only_model)" in error


@pytest.mark.slow
def test_a_finished_run_that_is_requeued_succeeds_and_says_so(
    pair_folders, text_file, tmp_path, capsys
):
    main(command(pair_folders[0], tmp_path, text_file))
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in SAVED}
    capsys.readouterr()
    main(command(pair_folders[0], tmp_path, text_file))
    assert capsys.readouterr().out == f"{tmp_path} already holds the finished student\n"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in SAVED} == before
    longer = command(pair_folders[0], tmp_path, text_file, "--max_steps", "5")
    assert "another run (max_steps was 2 and is 5)" in error_of(capsys, longer)
    other = command(pair_folders[0], tmp_path, text_file, "--save_dtype", "bfloat16")
    assert "another run (save_dtype was float32 and is bfloat16)" in error_of(capsys, other)
    afresh = command(pair_folders[0], tmp_path, text_file, "--resume_from_checkpoint", "false")
    assert "already holds a model: name another" in error_of(capsys, afresh)


@pytest.mark.slow
def test_chosen_layers_are_chosen_once(pair_folders, text_file, tmp_path, capsys, monkeypatch):
    chosen = ["--kept_layers", "auto", "--calibration", text_file]
    main(command(pair_folders[0], tmp_path, text_file, *chosen))
    kept = json.loads((tmp_path / "run.json").read_text())["settings"]["kept_layers"]
    for name in SAVED:
        (tmp_path / name).unlink()
    (tmp_path / "run.json").unlink()

    def chooses(*_):
        raise AssertionError("chosen again")

    monkeypatch.setattr("train.run.choose_layers", chooses)
    capsys.readouterr()
    main(command(pair_folders[0], tmp_path, text_file, *chosen))
    assert f"student of {len(kept)} layers" in capsys.readouterr().out
    other = command(pair_folders[0], tmp_path, text_file, *chosen, "--num_kept_layers", "3")
    assert "num_kept_layers was None and is 3" in error_of(capsys, other)


def test_settings_are_compared_by_name():
    values = {
        "kept_layers": "0,2", "num_kept_layers": 2, "seed": 3, "logging_steps": 5,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    settings = run_settings(values, LayerMap((0, 2), 3), "hash", world_size=2)
    assert settings == {
        "seed": 3, "kept_layers": [0, 2], "num_teacher_layers": 3, "teacher": "hash",
        "rows_per_step": 16,
    }  # fmt: skip
    assert differences({"seed": 4}, settings) == ["seed was 4 and is 3"]


def test_a_stream_that_holds_out_other_documents_is_another_text():
    """With --eval_dataset none are held out, so they are trained on."""
    stream = Rows(iter(()), None)
    alone = text_settings(stream, [], DataArguments("text", streaming=True))
    other = text_settings(stream, [], DataArguments("text", streaming=True, eval_dataset="held"))
    assert differences(alone, other) == ["held_out_of_stream was 64 and is 0"]


def test_every_row_of_local_text_counts():
    def settings(*parts: Dataset) -> dict:
        return text_settings(Rows(concatenate_datasets(parts), None), ["a.jsonl"], None)

    rows = [{"input_ids": [i, 7, i % 5], "document_lengths": [2, 1]} for i in range(1000)]
    whole = settings(Dataset.from_list(rows))
    assert settings(Dataset.from_list(rows[:333]), Dataset.from_list(rows[333:])) == whole
    for change in ({"input_ids": [555, 7, 4]}, {"document_lengths": [1, 2]}):
        changed = [row | change if i == 555 else row for i, row in enumerate(rows)]
        (found,) = differences(whole, settings(Dataset.from_list(changed)))
        assert found.startswith("all_rows was ")
    older = {"text": whole["text"]}
    assert differences(older, whole) == []
    assert differences(older, settings(Dataset.from_list(rows[1:])))
