"""Model cards, and models that come from and go to the hub; nothing here touches a network."""

import json
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_module
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from patching_models import LAYER_MAP, change_config, family_pair, save_models
from transformers import AutoModelForCausalLM, Qwen3Config

from patching.assemble import ParameterCount, assemble
from patching.checkpoints import hub
from patching.checkpoints.model_card import model_card, runs
from patching.checkpoints.origin import License, Origin, origin_of
from patching.checkpoints.sizes import Size
from patching.patch import main
from patching.recipe import LayerSource, Recipe, Reference, intermediate_model

SIZE = Size(5, ParameterCount(10**9, 2 * 10**9), 10**9, 2 * 10**9, 2 * 10**9, None, 10**9)
RECIPE = intermediate_model(LAYER_MAP, 1, "last")
COMMITS = {"teacher": "0" * 39 + "1", "student": "0" * 39 + "2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("pair"), *family_pair("qwen3", tied=True))


MIT, APACHE = License("mit"), License("apache-2.0")
QWEN = License("other", "qwen-research", "https://example.org/LICENSE")


def card(teacher_license: License | None, student_license: License | None) -> ModelCard:
    origins = {
        "teacher": Origin("org/teacher", "main", COMMITS["teacher"], None, teacher_license),
        "student": Origin("org/student", None, None, None, student_license),
    }
    return ModelCard(model_card("title", RECIPE, SIZE, origins, Qwen3Config()))


@pytest.mark.parametrize(
    ("licenses", "stated"),
    [
        ((APACHE, APACHE), APACHE),
        ((QWEN, QWEN), QWEN),
        ((License(("mit", "gpl")), License(("mit", "gpl"))), License(["mit", "gpl"])),
        ((APACHE, None), License(None)),
        ((None, None), License(None)),
        ((APACHE, License("llama3.2")), License("other", "those-of-both-parents")),
        ((QWEN, QWEN._replace(name="other")), License("other", "those-of-both-parents")),
    ],
)
def test_a_license_is_claimed_if_every_parent_states_it(licenses, stated):
    made = card(*licenses)
    found = (made.data.get(f"license{part}") for part in ("", "_name", "_link"))
    assert License(*found) == stated
    assert made.data.base_model == ["org/teacher", "org/student"]
    assert made.data.base_model_relation == "merge"
    assert made.data.library_name == "transformers"
    for license_ in licenses:
        assert str(license_ or "not stated in its card") in made.text
    assert COMMITS["teacher"] in made.text
    assert 'from_pretrained("title")' in made.text


def test_layers_as_runs():
    assert runs(RECIPE) == [("0-1", "student 0-1"), ("2-4", "teacher 3-5")]
    recipe = Recipe.of([LayerSource("teacher", i) for i in (0, 2, 3)])
    assert runs(recipe) == [("0", "teacher 0"), ("1-2", "teacher 2-3")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# Card\n", MIT),
        (
            "---\nlicense: other\nlicense_name: qwen-research\n"
            "license_link: https://example.org/LICENSE\n---\n",
            QWEN,
        ),
        ("---\nlicense: [mit, gpl]\n---\n", License(("mit", "gpl"))),
        ("---\nlicense: {mit: true}\n---\n", None),
        ("---\nlicense: []\n---\n", None),
        ("# A card without metadata\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_a_license_is_read_from_the_parents_card(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    origin = origin_of(Reference(str(tmp_path)))
    assert origin == Origin(None, None, None, None, expected)


def flags(names: tuple[str, str], folder: Path, *more: str) -> list[str]:
    return [
        *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
        *("--num_layers_to_patch", "1", "--save_directory", str(folder)),
        *more,
    ]


def test_a_saved_model_has_a_card_without_folders_of_this_machine(folders, tmp_path):
    main(flags(folders, tmp_path / "made"))
    made = ModelCard.load(tmp_path / "made" / "README.md")
    assert made.data.base_model is None
    assert "# made" in made.text
    assert "| teacher | a local model |" in made.text
    assert str(tmp_path.parent) not in made.content
    assert "| 2-4 | teacher 3-5 |" in made.text


def in_cache(cache: Path, folder: str, repository: str, commit: str, license_name: str) -> None:
    """A folder as the hub's client would have downloaded it, with links to blobs."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "v1").write_text(commit)
    for path in Path(folder).iterdir():
        shutil.copy(path, root / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    (snapshot / "README.md").write_text(f"---\nlicense: {license_name}\n---\n")


@pytest.mark.slow
@torch.no_grad()
def test_parents_by_repository_name_and_revision(folders, tmp_path):
    cache = tmp_path / "cache"
    for folder, parent in zip(folders, ("teacher", "student")):
        in_cache(cache, folder, f"org/{parent}", COMMITS[parent], "mit")
    done = run_module(
        "patching.patch",
        *flags(("org/teacher", "org/student"), tmp_path / "out"),
        *("--revision", "v1", "--student_revision", "v1"),
        HF_HUB_CACHE=str(cache),
    )
    assert done.returncode == 0, done.stderr
    parents = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    expected = assemble(RECIPE, teacher=parents[0], student=parents[1])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(9)[None]
    assert torch.equal(saved(tokens).logits, expected(tokens).logits)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == Path(folders[0], name).read_bytes()
        assert not (tmp_path / "out" / name).is_symlink()
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["copied_file_to_file"]
    assert {p: values["commit"] for p, values in provenance["parents"].items()} == COMMITS
    made = ModelCard.load(tmp_path / "out" / "README.md")
    assert made.data.license == "mit"
    assert made.data.base_model == ["org/teacher", "org/student"]
    done = run_module(
        "patching.patch",
        *flags(("org/teacher", "org/student"), tmp_path / "other", "--revision", "v9"),
        HF_HUB_CACHE=str(cache),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "org/teacher" in done.stderr


class Hub:
    """What the hub was asked to do."""

    def __init__(self, existing: dict[str, bool] | None = None, fails: bool = False) -> None:
        self.existing, self.fails, self.calls = existing or {}, fails, []

    def whoami(self) -> dict:
        return {"name": "someone"}

    def repo_exists(self, repository: str) -> bool:
        return repository in self.existing

    def repo_info(self, repository: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.existing[repository])

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        self.calls.append(("create", repository, private))

        class Address(str):
            repo_id = repository

        return Address(f"https://huggingface.co/{repository}")

    def create_commit(self, repository: str, operations: list, *, commit_message: str) -> None:
        if self.fails:
            raise ConnectionError("no route to host")
        contents = {}
        for operation in operations:
            with operation.as_file() as file:
                contents[operation.path_in_repo] = file.read()
        self.calls.append(("upload", repository, contents))


@pytest.fixture(autouse=True)
def hub_accepts_cards(monkeypatch):
    """The hub's check of a card needs a network. Its result is what a test sets."""
    monkeypatch.setattr(hub.ModelCard, "validate", lambda *_, **__: None)


@pytest.mark.parametrize("public", [False, True])
def test_a_push_is_private_unless_asked_otherwise(public, folders, tmp_path, monkeypatch, capsys):
    there = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    more = ("--push_to_hub", "someone/model", *(["--public"] if public else []))
    main(flags(folders, tmp_path / "out", *more))
    create, (action, repository, files) = there.calls
    assert create == ("create", "someone/model", not public)
    assert (action, repository) == ("upload", "someone/model")
    assert files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    for name, content in files.items():
        if name != "provenance.json":
            assert content == (tmp_path / "out" / name).read_bytes()
    assert "uploaded to https://huggingface.co/someone/model" in capsys.readouterr().out
    assert "# someone/model" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_published_by_accident(folders, tmp_path, monkeypatch, capsys):
    there = Hub({"someone/public": False, "someone/private": True})
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    with pytest.raises(SystemExit) as ended:
        main(flags(folders, tmp_path / "out", "--push_to_hub", "someone/public"))
    assert ended.value.code == 2
    assert "this repository is public; add --public" in capsys.readouterr().err
    assert there.calls == []
    assert not (tmp_path / "out").exists()
    main(flags(folders, tmp_path / "out", "--push_to_hub", "someone/private"))
    assert there.calls[-1][:2] == ("upload", "someone/private")


def test_who_is_not_logged_in_learns_it_first(folders, tmp_path, monkeypatch, capsys):
    there = Hub()

    def whoami():
        raise LocalTokenNotFoundError("Token is required")

    there.whoami = whoami
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    with pytest.raises(SystemExit) as ended:
        main(flags(folders, tmp_path / "out", "--push_to_hub", "someone/model"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Token is required\n"
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_model(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(fails=True))
    with pytest.raises(SystemExit) as ended:
        main(flags(folders, tmp_path / "out", "--push_to_hub", "someone/model"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"the model is complete in {tmp_path / 'out'}" in error
    assert "no route to host" in error
    assert "someone/model on the hub is new and still empty" in error
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_card_that_the_hub_refuses_makes_no_repository(folders, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError('"license" must be one of ...')

    there = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    monkeypatch.setattr(hub.ModelCard, "validate", refuse)
    with pytest.raises(SystemExit, match="2"):
        main(flags(folders, tmp_path / "out", "--push_to_hub", "someone/model"))
    error = capsys.readouterr().err
    assert '"license" must be one of' in error and "nothing was created on the hub" in error
    assert there.calls == []


def test_what_is_uploaded_says_nothing_about_this_machine(folders, tmp_path, monkeypatch):
    there = Hub({"someone/model": True})
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    parents = [
        shutil.copytree(folder, tmp_path / "secret-parents" / name)
        for folder, name in zip(folders, ("our-teacher", "our-student"))
    ]
    change_config(parents[0], _name_or_path="/home/somebody/models/teacher")
    main(flags(tuple(map(str, parents)), tmp_path / "out", "--push_to_hub", "someone/model"))
    files = there.calls[-1][2]
    words = [tmp_path.name, "secret-parents", "our-teacher", "our-student", "somebody"]
    words += [socket.gethostname(), "argv", "--save_directory", sys.argv[0]]
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            for word in words:
                assert word.encode() not in content, (name, word)
    shared = json.loads(files["provenance.json"])
    local = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert local["local_parents"]["teacher"] == str(parents[0])
    assert local["arguments"]["save_directory"] == str(tmp_path / "out")
    assert shared == {name: value for name, value in local.items() if name in shared}
    assert shared["recipe"] == RECIPE.to_dict()
    hashes = [shared["parents"][parent]["fingerprint"] for parent in ("teacher", "student")]
    assert len(set(hashes)) == 2 and all(len(found) == 16 for found in hashes)


def test_license_files_come_along(folders, tmp_path):
    parents = [
        shutil.copytree(folder, tmp_path / name)
        for folder, name in zip(folders, ("teacher", "student"))
    ]
    for folder, name, text in (
        (parents[0], "LICENSE", "of the teacher"),
        (parents[1], "LICENSE", "of the student"),
        (parents[0], "NOTICE.txt", "the same"),
        (parents[1], "NOTICE.txt", "the same"),
        (parents[1], "license.md", "one only"),
    ):
        (folder / name).write_text(text)
    main(flags(tuple(map(str, parents)), tmp_path / "out"))
    texts = {
        path.name: path.read_text()
        for path in (tmp_path / "out").iterdir()
        if "licen" in path.name.lower() or "notice" in path.name.lower()
    }
    assert texts == {
        "teacher-LICENSE": "of the teacher",
        "student-LICENSE": "of the student",
        "NOTICE.txt": "the same",
        "license.md": "one only",
    }
    size = ("--num_layers_to_patch", "2", "--save_directory", str(tmp_path / "alone"))
    main([*flags(tuple(map(str, parents)), tmp_path)[:4], *size])
    assert (tmp_path / "alone" / "LICENSE").read_text() == "of the teacher"
    assert not (tmp_path / "alone" / "license.md").exists()
