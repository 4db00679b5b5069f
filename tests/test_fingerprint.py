"""Fingerprints of models: every byte counts, and large files are read once."""

import os
import shutil

import pytest
from huggingface_hub import constants

from patching.checkpoints.fingerprint import GENERATION, TOKENIZER, fingerprint
from patching.files import hashes as module
from patching.recipe import Reference


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model of 8 MiB, and an empty cache of assets."""
    monkeypatch.setattr(
        module, "cached_assets_path", lambda *names: _made(tmp_path / "assets" / "/".join(names))
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "generation_config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(2**23))
    return model


def _made(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def identify(folder):
    return [
        fingerprint(Reference(str(folder)), *patterns)
        for patterns in ((), (TOKENIZER,), (GENERATION,))
    ]


def test_a_repository_is_known_by_its_commit(folder, tmp_path, monkeypatch):
    """As it lies in the local cache of the hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in (("main", "0" * 40), ("v2", "1" * 40)):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    for patterns in ((), (TOKENIZER,)):
        known = [fingerprint(Reference("someone/model", of), *patterns) for of in (None, "v2")]
        assert known == [f"someone/model@{'0' * 40}", f"someone/model@{'1' * 40}"]


def test_any_byte_of_the_weights_counts(folder):
    before = identify(folder)
    assert identify(folder) == before and before[0].startswith("model ")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[3 * 2**20] = 1  # neither at the ends nor in the middle
    weights.write_bytes(content)
    after = identify(folder)
    assert after[0] != before[0] and after[1:] == before[1:]


@pytest.mark.parametrize(
    ("name", "changed"),
    [("config.json", 0), ("tokenizer.json", 1), ("generation_config.json", 2)],
)
def test_each_file_counts_for_its_part(folder, name, changed):
    before = identify(folder)
    (folder / name).write_text('{"other": 1}')
    assert [a != b for a, b in zip(identify(folder), before)] == [i == changed for i in range(3)]


def test_a_large_file_is_read_again_only_if_its_size_or_times_change(folder, monkeypatch):
    read = []
    read_hash = module._read_hash
    monkeypatch.setattr(
        module, "_read_hash", lambda path: read.append(path.name) or read_hash(path)
    )
    before = identify(folder)[0]
    read.clear()
    assert identify(folder)[0] == before
    assert "model.safetensors" not in read and "config.json" in read
    weights = folder / "model.safetensors"
    found = weights.stat()
    weights.write_bytes(b"\1" * 2**23)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))  # as `cp --preserve` does
    assert identify(folder)[0] != before


def test_a_cache_that_cannot_be_used_changes_nothing(folder, monkeypatch):
    before = identify(folder)

    def fail(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(module, "cached_assets_path", fail)
    assert identify(folder) == before
