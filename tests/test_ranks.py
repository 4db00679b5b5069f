"""Ranks without torchrun. Tests with two ranks are in test_sweep.py."""

from pathlib import Path

import pytest
from local_tasks import flags

from evaluate.evaluate import main
from evaluate.ranks import Ranks, deal
from patching.files.outputs import num_ranks


def test_a_world_size_without_torchrun_is_one_line(pair_folders, tmp_path, monkeypatch, capsys):
    """A scheduler may set it for a single process, which would wait for others for days."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(flags(pair_folders, tmp_path / "out"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE=4 is set, but torchrun did not start this process: unset" in line


def test_requests_with_the_same_context_stay_together_and_each_is_dealt_once():
    requests = [(context, number) for number in range(3) for context in ("a", "bbb", "cc", "dddd")]
    shares = deal(requests, 3)
    assert sorted(i for share in shares for i in share) == [*range(12)]
    contexts = [{requests[i][0] for i in share} for share in shares]
    assert contexts == [{"dddd", "a"}, {"bbb"}, {"cc"}]
    assert deal(requests[:1], 3) == [[0], [], []]


def test_a_single_process_needs_no_group():
    ranks = Ranks()
    assert ranks.is_first and ranks.from_first("x") == "x"
    assert ranks.together(lambda: 1) == 1
    with pytest.raises(FileNotFoundError):
        ranks.together(Path("/no/such/file").read_text)
    ranks.release()
    ranks.end()


def test_a_local_rank_of_minus_one_is_a_single_process(monkeypatch):
    """transformers and other launchers say so."""
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert num_ranks() == 1
