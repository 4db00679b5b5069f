"""Flags that say which models a sweep loads and how they run: revisions, attention, batches."""

import hashlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from local_tasks import CHOICE, QUESTIONS, ROLLING, TEXTS, flags, write_task
from safetensors.torch import load_file, save_file

from evaluate import series
from evaluate.evaluate import main
from evaluate.result import read_results
from patching.running.prefix_tree import PrefixTree


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(folder, "choice", QUESTIONS, **CHOICE)
    return folder


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def publish(cache: Path, repository: str, revision: str, folder: Path) -> None:
    """A folder as the hub's client keeps one revision of a repository."""
    root = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit_of(revision))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit_of(revision))


@pytest.fixture
def repository(pair_folders, tmp_path, monkeypatch) -> str:
    """A repository whose revision v1 is the student, and v2 one with other weights. It has no main
    branch.
    """
    other = tmp_path / "other"
    shutil.copytree(pair_folders[1], other)
    weights = load_file(other / "model.safetensors")
    weights = {name: tensor.roll(1, 0) for name, tensor in weights.items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, folder in (("v1", pair_folders[1]), ("v2", other)):
        publish(tmp_path / "hub", "someone/student", revision, folder)
    return "someone/student"


def test_revisions_of_compared_models_and_second_students(
    pair_folders, tasks, repository, tmp_path
):
    settings = {"num_layers_to_patch": 0, "tasks": "rolling", "include_path": tasks}
    second = {"random_student": repository, "random_student_revision": "v2"}
    compared = [f"--compare={repository}@{revision}" for revision in ("v1", "v2")]
    main([*flags(pair_folders, tmp_path / "out", **settings, **second), *compared])
    results = read_results(tmp_path / "out")
    names = ("compare_student@v1", "compare_student@v2", "random_student_k0", "family_k0")
    assert results.keys() == {*names}
    bits = [results[name].results["rolling"]["bits_per_byte,none"] for name in names]
    assert bits[0] == pytest.approx(bits[3], rel=1e-6)
    assert bits[1] == pytest.approx(bits[2], rel=1e-6)
    assert abs(bits[0] - bits[1]) > 0.01
    for name, revision in (("compare_student@v1", "v1"), ("compare_student@v2", "v2")):
        assert results[name].settings_of("rolling")["model"].endswith(commit_of(revision))
    of_second = results["random_student_k0"].settings_of("rolling")["student"]
    assert of_second.endswith(commit_of("v2"))


@pytest.mark.parametrize(
    "given", ["--compare=NAME", "--compare=NAME@v3", "--random_student=NAME"], ids=str
)
def test_a_revision_that_is_not_there(pair_folders, tasks, repository, tmp_path, capsys, given):
    settings = {"tasks": "rolling", "include_path": tasks}
    with pytest.raises(SystemExit) as ended:
        main(
            [*flags(pair_folders, tmp_path / "out", **settings), given.replace("NAME", repository)]
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err.count(repository) >= 1
    assert not (tmp_path / "out").exists()


def test_attention_is_the_one_asked_for(pair_folders, tasks, tmp_path, monkeypatch):
    """Of the family and of compared models. Other attention is other arithmetic, so scores are
    computed again.
    """
    used, lm_of = [], series.lm_of

    def noted(tree, *args):
        used.extend(model.config._attn_implementation for model in tree.models.values())
        return lm_of(tree, *args)

    monkeypatch.setattr(series, "lm_of", noted)
    settings = {"num_layers_to_patch": "0,1", "tasks": "choice", "include_path": tasks}
    settings["compare"] = pair_folders[0]
    found = []
    for given in ([], ["--attn_implementation", "eager"], ["--attn_implementation", "eager"]):
        used.clear()
        main([*flags(pair_folders, tmp_path / "out", **settings), *given])
        results = read_results(tmp_path / "out")
        found.append([result.tasks["choice"] for result in results.values()])
        expected = {"sdpa"} if not given else {"eager"}
        assert set(used) == (set() if len(found) == 3 else expected)
    assert found[1] == found[2]
    for before, after in zip(found[0], found[1], strict=True):
        assert "attn_implementation" not in before.sources
        assert after.sources == before.sources | {"attn_implementation": "eager"}


@pytest.mark.parametrize("most", [None, 2])
def test_automatic_batches_have_a_greatest_number_of_rows(
    pair_folders, tasks, tmp_path, monkeypatch, most
):
    num_rows, logits = [], PrefixTree.logits

    def noted(self, inputs, positions_N):
        num_rows.append(len(inputs["input_ids"]))
        return logits(self, inputs, positions_N)

    monkeypatch.setattr(PrefixTree, "logits", noted)
    settings = {"num_layers_to_patch": 0, "tasks": "rolling", "include_path": tasks}
    settings["batch_size"] = "auto"
    limit = {} if most is None else {"max_batch_size": most}
    main(flags(pair_folders, tmp_path / "out", **settings, **limit))
    assert max(num_rows) == (most or len(TEXTS))
    assert sum(num_rows) == len(TEXTS)
