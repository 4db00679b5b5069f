"""`--push_to_hub` uploads the finished student, and nothing else."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl

from patching.checkpoints.hub import push
from train import student_card
from train.train import main
from train.training_args import DistillationArguments


def command(teacher, folder, dataset, *flags) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher, "save_directory": folder, "dataset": dataset,
        "max_length": 32, "max_steps": 2, "per_device_train_batch_size": 4, "bf16": False,
        "gradient_accumulation_steps": 2, "save_steps": 1, "disable_tqdm": True,
        "resume_from_checkpoint": "last", "measure_order": False,
    }  # fmt: skip
    words = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return [*words, *map(str, flags)]


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """A hub that accepts everything and notes what it gets."""
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create_repo", repo_id, kwargs))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def create_commit(self, repo_id, operations, commit_message):
        calls.append(("create_commit", repo_id, {each.path_in_repo for each in operations}))

    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "repo_exists", lambda self, name: False)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "validate", lambda *_, **__: None)
    return calls


def test_a_reader_of_the_card_never_sees_half_of_it(tmp_path, monkeypatch):
    """The file that is there is replaced, and not written to."""
    card = tmp_path / "README.md"
    card.write_text("before")
    os.link(card, tmp_path / "open file")
    monkeypatch.setattr(student_card, "student_card", lambda *_: "after, café")
    student_card.write_student_card(tmp_path, "title", None, None, None, {}, {})
    assert card.read_text(encoding="utf-8") == "after, café"
    assert (tmp_path / "open file").read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 2


def test_only_the_student_is_uploaded_and_privately(hub, pair_folders, text_file, tmp_path, capsys):
    folder = tmp_path / "my-student"
    (folder / "cache").mkdir(parents=True)
    for name in ("train.log", "notes.md", "config.yaml", "cache/rows-00000.safetensors"):
        (folder / name).write_text("private")
    words = command(pair_folders[0], folder, text_file, "--push_to_hub", "True")
    main(words)
    created, uploaded = hub
    assert created[:2] == ("create_repo", "me/my-student")
    assert created[2]["private"] is True
    assert uploaded[:2] == ("create_commit", "me/my-student")
    assert uploaded[2] == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "student_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (folder / "checkpoints/checkpoint-2").is_dir()
    assert json.loads((folder / "run.json").read_text())["arguments"]["push_to_hub"] is True
    assert "student uploaded to https://huggingface.co/me/my-student" in capsys.readouterr().out
    main(words)  # requeued, perhaps because the upload had failed
    assert len(hub) == 4 and hub[3] == uploaded

    record = json.loads((folder / "run.json").read_text())
    del record["files"]  # as an older version wrote it
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and len(hub) == 4
    assert "upload what you choose with `hf upload my-student " in capsys.readouterr().err


def test_a_public_student_with_a_name(hub, pair_folders, text_file, tmp_path):
    flags = ["--push_to_hub", "True", "--hub_model_id", "us/small", "--public", "True"]
    flags += ["--save_strategy", "no", "--save_steps", "100"]
    main(command(pair_folders[0], tmp_path, text_file, *flags))
    assert hub[0][1] == "us/small"
    assert hub[0][2]["private"] is False
    assert 'from_pretrained("us/small")' in (tmp_path / "README.md").read_text()


def test_a_name_without_owner_is_that_of_the_user(
    hub, pair_folders, text_file, tmp_path, capsys, monkeypatch
):
    """The hub finds public models of its first days under such names, and not the user's."""
    monkeypatch.setattr(HfApi, "repo_exists", lambda self, name: name in ("gpt2", "me/student"))
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name: SimpleNamespace(private=False))
    words = ["--push_to_hub", "True", "--max_steps", "1"]
    with pytest.raises(SystemExit) as ended:
        main(command(pair_folders[0], tmp_path / "student", text_file, *words))
    assert ended.value.code == 2
    assert "me/student: this repository is public; add --public" in capsys.readouterr().err
    assert not hub and not (tmp_path / "student").exists()
    main(command(pair_folders[0], tmp_path / "gpt2", text_file, *words))
    assert hub[0][1] == "me/gpt2"


def test_what_becomes_public_during_a_run_gets_no_student(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "repo_exists", lambda self, name: True)
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name: SimpleNamespace(private=False))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(OSError, match="me/student has become public, and --public was not given"):
        push(tmp_path, "student", public=False)
    assert not hub


def test_what_cannot_be_pushed_ends_before_weights_load(
    pair_folders, text_file, tmp_path, capsys, monkeypatch
):
    def nobody(self):
        raise OSError("not logged in")

    monkeypatch.setattr(HfApi, "whoami", nobody)
    monkeypatch.setattr("train.run.load_teacher", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as ended:
        main(command(pair_folders[0], tmp_path, text_file, "--push_to_hub", "True"))
    assert ended.value.code == 2
    assert "error: not logged in" in capsys.readouterr().err
    for flag, value in (("hub_strategy", "end"), ("hub_private_repo", True),
                        ("hub_always_push", True), ("hub_token", "x"), ("public", True),
                        ("hub_model_id", "a/b"), ("hub_revision", "dev")):  # fmt: skip
        with pytest.raises(ValueError, match=flag):
            DistillationArguments(save_directory=str(tmp_path), **{flag: value})


def test_the_card_says_what_the_student_is_and_hides_the_machine(pair_folders, text_file, tmp_path):
    folder = tmp_path / "student"
    main(command(pair_folders[0], folder, text_file))
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation"
    assert "base_model" not in metadata
    for expected in (
        "# student", "A student of 4 layers, made from a teacher of 6",
        "| teacher | a local model |",
        "| optimizer steps | 2 |", "| kept teacher layers | 0,2,4,5 |", "| text | local files |",
        "| loss | 1 cross entropy, 0.1 KL, 2 cosine |", "| kl, held out | ",
        "it makes 3 sizes from", "python -m patching.patch", "--num_layers_to_patch 1",
    ):  # fmt: skip
        assert expected in card, expected
    assert "epoch" not in card
    assert str(tmp_path) not in card
    assert str(text_file.parent) not in card


def test_the_card_hides_the_machine_of_a_mixture(text_file, tmp_path):
    other = shutil.copy(text_file, tmp_path / "other.jsonl")
    mixture = f"{text_file}=0.7,{other}=0.3,org/texts=2"
    fact = student_card.text_fact(mixture)
    assert fact == "local files (0.7), local files (0.3), org/texts (2)"
    assert student_card.text_fact(str(text_file)) == "local files"
    assert student_card.text_fact("org/texts") == "org/texts"
