"""JSON files: read whole or refused unread."""

import os

import pytest
from limits import bounded

from patching.files.json_files import load_json, read_object


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_unread(make, tmp_path):
    make(tmp_path / "a.json")
    with bounded(seconds=10), pytest.raises(ValueError, match="is not a regular file"):
        load_json(tmp_path / "a.json")


def test_a_link_to_a_file_is_read_as_in_a_hub_cache(tmp_path):
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "a.json").symlink_to("blob")
    assert load_json(tmp_path / "a.json") == {"a": 1}


def test_at_most_so_many_bytes_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "é"}')
    assert load_json(path, most_bytes=11) == read_object(path, most_bytes=11) == {"a": "é"}
    with pytest.raises(ValueError, match="it has 11 bytes, and at most 10 are read"):
        load_json(path, most_bytes=10)
    with pytest.raises(ValueError, match=r"a.json is damaged \(it has 11 bytes.*\): remove it"):
        read_object(path, most_bytes=10)
