"""Reading texts, and finding those that also appear in others."""

import errno
import os

import datasets
import pytest

from patching.files.texts import _is_of_cache, load_documents, num_found_in


def test_texts_are_found_however_they_are_cut():
    lines = [f"line {i} is long enough that no other text has it too" for i in range(9)]
    others = ["\n".join(lines[:4]), f"  {lines[4]}\n\n{lines[5]}", "a short one", "# Licence"]
    texts = {
        "\n".join(lines[2:5]): True,
        "\n".join(["# Licence", *lines[6:8]]): False,  # short lines prove nothing
        "\n".join(lines[5:7]): True,
        "\n".join(lines[5:8]): False,  # less than half
        " a short one": True,
        "another short one": False,
    }
    for text, is_found in texts.items():
        assert num_found_in([text], others) == is_found
    assert num_found_in(texts, others) == 3


def test_other_text_with_the_name_size_and_time_of_the_first_is_read(tmp_path):
    """As after `cp -p` or a clock that was set back."""
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n')
    before = path.stat()
    assert load_documents(str(path))["text"] == ["one"]
    path.write_text('{"text": "two"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_documents(str(path))["text"] == ["two"]


def test_a_cache_where_nothing_can_be_written_is_not_a_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "text.jsonl" / "cache")
    with pytest.raises(ValueError, match="cannot be kept in .*cache .Not a dir.*set HF_DATASETS"):
        load_documents(str(path))
    path.write_text('{"text": "one"\n')
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be read as json.*download or save it again"):
        load_documents(str(path))


def test_a_text_that_cannot_be_read_is_not_the_caches_fault(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("")
    files = [os.path.relpath(path)]
    for error, is_of_cache in (
        (PermissionError(errno.EACCES, "Permission denied", str(path)), False),
        (PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache")), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError("Not a gzipped file"), False),
        (ValueError("not JSON"), False),
    ):
        assert _is_of_cache(error, files) == is_of_cache
