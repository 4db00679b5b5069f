"""student_config.json: the published form, ours, and what is refused."""

import json

import pytest

from patching.blocks import LayerMap
from patching.student_config import FILE_NAME, StudentConfig, read_student_config

PUBLISHED = {"pruned_teacher_layers": [1, 3], "copied_teacher_layers": [0, 2, 4, 5]}


def test_the_published_two_keys(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps(PUBLISHED))
    config = read_student_config(str(tmp_path))
    assert config == StudentConfig(LayerMap((0, 2, 4, 5), 6), None)


def test_round_trip_keeps_the_published_keys(tmp_path):
    StudentConfig(LayerMap((0, 2, 4, 5), 6), "first").save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text()) == PUBLISHED | {"patch_order": "first"}
    assert read_student_config(str(tmp_path)).patch_order == "first"
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_hub_repository_from_the_local_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--student"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / FILE_NAME).write_text(json.dumps(PUBLISHED))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v2").write_text(commit)
    from transformers.utils import hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "v2", commit):
        config = read_student_config("someone/student", revision)
        assert config.layer_map.kept == (0, 2, 4, 5)
    with pytest.raises(ValueError, match="someone/other/student_config.json cannot be read"):
        read_student_config("someone/other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a valid student config"),
        ("[]", "is not a valid student config"),
        ('{"copied_teacher_layers": [0]}', "lacks the list 'pruned_teacher_layers'"),
        (
            json.dumps(PUBLISHED | {"pruned_teacher_layers": [1]}),
            "every teacher layer exactly once",
        ),
        (
            json.dumps(PUBLISHED | {"patch_order": "middle"}),
            "patch_order=middle: choose last or first",
        ),
        (
            json.dumps({"copied_teacher_layers": [1, 2], "pruned_teacher_layers": [0]}),
            "must start at 0",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_student_config(str(tmp_path))


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"student_config.json cannot be read: a student needs it"):
        read_student_config(str(tmp_path))
