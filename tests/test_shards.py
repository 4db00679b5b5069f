"""A sweep in shards: the same report, each part run once."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task

from evaluate.evaluate import main
from evaluate.report import main as report
from evaluate.result import read_results
from evaluate.shards import Shard


@given(st.integers(0, 40), st.integers(1, 12))
def test_shards_have_each_part_once(num_parts, count):
    slices = [Shard(i, count).of(range(num_parts)) for i in range(1, count + 1)]
    assert [part for of_shard in slices for part in of_shard] == [*range(num_parts)]
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3"])
def test_what_is_no_shard(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags(("t", "s"), tmp_path, shard=text))
    assert ended.value.code == 2
    assert f"shard={text}: write i/n, with i from 1 to n" in capsys.readouterr().err


def without_costs(folder: Path) -> dict[str, str]:
    """The report, but for times and memory."""
    markdown = (folder / "summary.md").read_text()
    rows = re.sub(r"\| [0-9,]+ \| [0-9.]+ [KMG]i?B \|$", "|", markdown, flags=re.M)
    summary = json.loads((folder / "summary.json").read_text())
    for model in summary["models"]:
        model["cost"] = None
    return {
        "md": rows,
        "json": json.dumps(summary, indent=2),
        "csv": (folder / "summary.csv").read_text(),
        "svg": re.sub(r'<dc:date>.*</dc:date>|id="\w+"|#\w+', "",
                      (folder / "summary.svg").read_text()),
    }  # fmt: skip


@pytest.mark.slow
def test_the_merged_report_is_that_of_the_whole_sweep(pair_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(tasks, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(tasks, "choice", QUESTIONS, **CHOICE)
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write_task(tasks, "generation", QUESTIONS, **GENERATION, metric_list=[metric])
    settings = {"num_layers_to_patch": "all", "include_path": tasks, "baselines": "naive"}
    settings["tasks"] = "rolling,choice,generation"
    main(flags(pair_folders, tmp_path / "whole", **settings))
    folders = [tmp_path / f"shard_{i}" for i in (1, 2, 3, 4)]
    counts = []
    for i, folder in enumerate(folders, start=1):
        main(flags(pair_folders, folder, shard=f"{i}/4", **settings))
        results = read_results(folder)
        counts.append(sum(len(result.tasks) for result in results.values()))
        before = (folder / "family_k0.json").stat().st_mtime_ns if "family_k0" in results else 0
        main(flags(pair_folders, folder, shard=f"{i}/4", **settings))  # nothing is left to do
        if before:
            assert (folder / "family_k0.json").stat().st_mtime_ns == before
    assert sorted(counts) == [3, 4, 4, 4]
    # In any sequence: shards know which of the parts they are.
    report([*map(str, reversed(folders)), "--save_directory", str(tmp_path / "merged")])
    assert without_costs(tmp_path / "merged") == without_costs(tmp_path / "whole")
    with pytest.warns(UserWarning, match="shards 2/4, 4/4 of this sweep are missing"):
        report([str(folders[0]), str(folders[2]), "--save_directory", str(tmp_path / "half")])
    report([str(tmp_path / "whole"), *map(str, folders), "--save_directory", str(tmp_path / "two")])
    models = json.loads((tmp_path / "two" / "summary.json").read_text())["models"]
    assert {model["sweep"] for model in models} == {"whole", "shard_1"}
