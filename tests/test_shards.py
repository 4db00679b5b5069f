"""A sweep in shards: the same report, each part run once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from limits import bounded
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task

from evaluate.evaluate import main
from evaluate.failures import store_failures
from evaluate.report import main as report
from evaluate.result import (
    FinishedTask,
    Parameters,
    Result,
    Run,
    read_results,
    update_result,
)
from evaluate.shards import Shard, shards_of


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


def stored_shard(folder: Path, number: int, failures: dict[str, str], **scores: float) -> Path:
    """A folder as shard `number` of 3 leaves it."""
    store_failures(folder, failures)
    for name, value in scores.items():
        run = Run({}, {"shard": f"{number}/3", "save_directory": str(folder)}, {})
        result = Result("family", int(name[-1]), 4, Parameters(10, 10), max_layers_to_patch=2)
        found = {"results": {"choice": {"acc,none": value}}}
        result.add_scores({"choice": FinishedTask(1.0, False)}, run, found)
        update_result(folder, name, lambda _, result=result: result)
    return folder


def test_missing_shards_are_counted_and_not_listed():
    found = {
        Path(str(i)): {"family_k0": Result("family", 0, 4, Parameters(1, 1), runs={"a": run})}
        for i, run in ((i, Run({}, {"shard": f"{i}/{10**15}"}, {})) for i in (2, 3))
    }
    with bounded(60):
        (sweep,) = shards_of(found)
    n = 10**15
    assert sweep.folders == [Path("2"), Path("3")]
    assert sweep.missing.startswith(f"1/{n}, 4/{n}, 5/{n}, ")
    assert sweep.missing.endswith(f"11/{n} and {n - 11:,} others")


def test_failures_of_shards_are_in_the_merged_report(tmp_path, capsys):
    no_data = {"no_data": "FileNotFoundError: no_data.jsonl"}
    folders = [
        stored_shard(tmp_path / "1", 1, no_data, family_k0=0.5),
        stored_shard(tmp_path / "2", 2, no_data | {"code": "KeyError: 'a'"}, family_k1=0.6),
        stored_shard(tmp_path / "3", 3, no_data | {"other": "ValueError: b"}),  # nothing else
    ]
    begun = tmp_path / "begun"
    begun.mkdir()
    with pytest.warns(UserWarning, match="begun: there are no results in it"):
        report([*map(str, [*folders, begun]), "--save_directory", str(tmp_path / "merged")])
    summary = json.loads((tmp_path / "merged" / "summary.json").read_text())
    assert summary["failures"] == no_data | {"code": "KeyError: 'a'", "other": "ValueError: b"}
    assert {model["model"] for model in summary["models"]} == {"student", "k = 1"}
    markdown = (tmp_path / "merged" / "summary.md").read_text()
    assert markdown.endswith(
        "## Not evaluated\n\n- no_data: FileNotFoundError: no_data.jsonl\n- code: KeyError: 'a'\n"
        "- other: ValueError: b\n"
    )

    stored_shard(folders[1], 2, no_data)  # it ran again, and one of them did not fail
    folder = stored_shard(tmp_path / "other", 1, {"code": "c"}, family_k0=0.4)
    other = json.loads((folder / "family_k0.json").read_text())
    next(iter(other["runs"].values()))["arguments"]["shard"] = None
    (folder / "family_k0.json").write_text(json.dumps(other))
    report([*map(str, [*folders[:2], folder]), "--save_directory", str(tmp_path / "two")])
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["failures"] == {f"1: {task}": why for task, why in no_data.items()} | {
        "other: code": "c"
    }

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        report([str(folders[2])])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no results, and no_data, other failed" in line


@pytest.mark.slow
def test_the_merged_report_is_that_of_the_whole_sweep(pair_folders, tmp_path, monkeypatch, caplog):
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
    main(flags(pair_folders, tmp_path / "none", shard="1/16", **settings))
    assert "shard 1/16: there are fewer scores than shards" in caplog.text
    assert not read_results(tmp_path / "none")
    # In any sequence: shards know which of the parts they are.
    report([*map(str, reversed(folders)), "--save_directory", str(tmp_path / "merged")])
    assert without_costs(tmp_path / "merged") == without_costs(tmp_path / "whole")
    with pytest.warns(UserWarning, match="shards 2/4, 4/4 of this sweep are missing"):
        report([str(folders[0]), str(folders[2]), "--save_directory", str(tmp_path / "half")])
    report([str(tmp_path / "whole"), *map(str, folders), "--save_directory", str(tmp_path / "two")])
    models = json.loads((tmp_path / "two" / "summary.json").read_text())["models"]
    assert {model["sweep"] for model in models} == {"whole", "shard_1"}


@pytest.mark.slow
def test_the_slurm_script_evaluates_and_merges(pair_folders, tmp_path, monkeypatch):
    """Its commands as a Slurm array runs them, one task of the array after the other."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(tasks, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(tasks, "choice", QUESTIONS, **CHOICE)
    settings = {"tasks": "rolling,choice", "include_path": tasks, "dtype": "float32"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for i in (1, 2):
        done = subprocess.run(
            ["bash", "examples/slurm/evaluate_array.sh", *words],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLURM_ARRAY_TASK_ID": str(i),
                "SLURM_ARRAY_TASK_COUNT": "2",
                "TEACHER": str(pair_folders[0]),
                "STUDENT": str(pair_folders[1]),
                "DIR": str(tmp_path / "out"),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "are missing" not in done.stderr
        assert (tmp_path / "out" / "summary.md").is_file()  # of the shards that are there
    every = {"num_layers_to_patch": "all", "baselines": "naive"}
    main(flags(pair_folders, tmp_path / "whole", **settings | every))
    assert without_costs(tmp_path / "out") == without_costs(tmp_path / "whole")
