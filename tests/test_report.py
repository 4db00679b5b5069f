"""Tables and plots from stored results."""

import csv
import json
import math
from dataclasses import replace

import pytest

from evaluate.plot import plot
from evaluate.report import main, markdown_table, short_names, write_report
from evaluate.result import Result
from evaluate.scores import averages, dips, kind_of, main_scores, scores_of


def values_of(k, series="family", **tasks):
    """What a sweep stores."""
    return {
        "series": series,
        "num_layers_to_patch": k,
        "max_layers_to_patch": 2,
        "depth": 4 + (k or 0),
        "parameters": {"both_counted": (10 + (k or 0)) * 10**8, "stored": (10 + (k or 0)) * 10**8},
        "results": tasks,
        "higher_is_better": {"wikitext": {"bits_per_byte": False}, "arc": {"acc": True}},
    }


def result(k, series="family", **tasks):
    return Result.from_dict(values_of(k, series, **tasks))


def choice(value, stderr=0.05):
    return {"acc,none": value, "acc_stderr,none": stderr}


WIKITEXT = {"alias": "wikitext", "bits_per_byte,none": 0.75, "bits_per_byte_stderr,none": "N/A"}
ARC = {"acc,none": 0.5, "acc_stderr,none": 0.05, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.04}
GSM = {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.01}


def test_scores_and_the_one_shown():
    stored = result(0, wikitext=WIKITEXT, arc=ARC, gsm=GSM)
    assert [(s.task, s.metric, s.value, s.stderr) for s in scores_of(stored)] == [
        ("wikitext", "bits_per_byte", 0.75, None),
        ("arc", "acc", 0.5, 0.05),
        ("arc", "acc_norm", 0.6, 0.04),
        ("gsm", "exact_match,strict-match", 0.1, 0.01),
    ]
    shown = main_scores(stored)
    assert shown["arc"].metric == "acc_norm"
    assert not shown["wikitext"].higher_is_better
    assert shown["gsm"].higher_is_better


def test_a_group_replaces_its_tasks():
    stored = result(0, mmlu=choice(0.4), stem=choice(0.3), algebra=choice(0.2), arc=ARC)
    stored.group_subtasks = {"mmlu": ["stem"], "stem": ["algebra"], "arc": []}
    assert list(main_scores(stored)) == ["mmlu", "arc"]
    del stored.results["mmlu"], stored.results["stem"]  # a group without a score of its own
    assert list(main_scores(stored)) == ["algebra", "arc"]


def test_kinds_follow_output_type_and_metric():
    stored = result(0, wikitext=WIKITEXT, arc=ARC, gsm=GSM, mmlu=choice(0.4), algebra=choice(0.3))
    stored.group_subtasks = {"mmlu": ["algebra"]}
    stored.configs = {
        "gsm": {"output_type": "generate_until"},
        "algebra": {"output_type": "generate_until"},
        "arc": {"output_type": "multiple_choice"},
    }
    kinds = {task: kind_of(stored, score) for task, score in main_scores(stored).items()}
    assert kinds == {
        "wikitext": "perplexity",
        "arc": "classification",
        "gsm": "generation",
        "mmlu": "generation",
    }


def test_averages_are_separate_by_kind_and_only_of_complete_rows():
    whole = result(0, wikitext=WIKITEXT, arc=ARC, boolq=choice(0.9, 0.03), gsm=GSM)
    part = result(1, wikitext=WIKITEXT, arc=ARC, gsm=GSM)
    whole.configs = part.configs = {"gsm": {"output_type": "generate_until"}}
    found = averages([whole, part])
    assert list(found) == ["classification", "generation", "perplexity (bits_per_byte)"]
    first, second = found["classification"]
    assert first.value == pytest.approx((0.6 + 0.9) / 2)
    assert first.stderr == pytest.approx(math.sqrt(0.04**2 + 0.03**2) / 2)
    assert second is None
    assert found["generation"][1].value == 0.1
    perplexity = found["perplexity (bits_per_byte)"][1]
    assert perplexity.value == 0.75
    assert perplexity.stderr is None
    assert not perplexity.higher_is_better


def test_perplexities_of_different_metrics_are_not_averaged():
    other = {"word_perplexity,none": 20.0}
    found = averages([result(0, wikitext=WIKITEXT, other=other)])
    assert list(found) == ["perplexity (bits_per_byte)", "perplexity (word_perplexity)"]


def test_dips_are_found_and_compared_with_their_error():
    rows = [
        result(0, arc=choice(0.5), wikitext={"bits_per_byte,none": 1.0}),
        result(2, arc=choice(0.4), wikitext={"bits_per_byte,none": 0.8}),
        result(1, arc=choice(0.48), wikitext={"bits_per_byte,none": 0.7}),
        result(1, "naive", arc=choice(0.1)),
    ]
    found = {(dip.result.num_layers_to_patch, dip.score.task): dip for dip in dips(rows)}
    assert found.keys() == {(1, "arc"), (2, "arc"), (2, "wikitext")}
    assert found[1, "arc"].is_significant is False  # 0.02 down, combined error 0.07
    assert found[2, "arc"].is_significant is True
    assert found[2, "arc"].combined_stderr == pytest.approx(math.sqrt(2) * 0.05)
    assert found[2, "wikitext"].is_significant is None
    cells = [line.split(" | ")[4:] for line in markdown_table(rows).splitlines()[2:]]
    marks = [[mark for mark in "▼▽" if mark in cell] for row in cells[:3] for cell in row]
    assert marks == [[], [], ["▼"], ["▼"], ["▽"], []]  # k = 0, 2, 1, each arc and wikitext


def test_the_table_names_ends_baselines_and_errors():
    rows = [
        result(0, arc=ARC),
        result(1, arc=ARC),
        result(2, arc=ARC),
        result(1, "naive", arc=ARC),
        result(None, "compare_small", wikitext=WIKITEXT),
    ]
    lines = markdown_table(rows).splitlines()
    assert lines[0] == (
        "| model | layers | parameters | stored | arc (acc_norm ↑) | wikitext (bits_per_byte ↓) |"
    )
    assert lines[2] == "| student | 4 | 1.00 B | 1.00 B | 0.6000 ± 0.0400 | - |"
    assert [line.split(" |")[0] for line in lines[3:]] == [
        "| k = 1",
        "| teacher",
        "| naively pruned, k = 1",
        "| small",
    ]


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_the_plot_has_a_panel_per_task_and_marks_the_ends(num_tasks):
    tasks = {f"task{i}": ARC for i in range(num_tasks)}
    rows = [result(k, **tasks) for k in range(3)]
    rows += [result(1, "naive", **tasks), result(None, "compare_small", **tasks)]
    figure = plot(rows)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(tasks)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"interpolated", "naively pruned", "student", "teacher", "small"}
    assert panels[0].get_xlabel() == "parameters (billions)"


def test_series_differ_without_colors():
    rows = [
        replace(result(k, series, arc=ARC), sweep=sweep)
        for sweep in "abc"
        for series in ("family", "naive")
        for k in (0, 1)
    ]
    containers = plot(rows).axes[0].containers
    looks = [
        (line.get_linestyle(), line.get_marker(), line.get_fillstyle())
        for line in (container.lines[0] for container in containers)
    ]
    assert len(looks) == 6 == len(set(looks))


def test_names_are_as_short_as_they_can_be():
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["a/results", "b/results"]) == ["a_results", "b_results"]
    assert short_names([]) == []


@pytest.fixture
def two_sweeps(tmp_path):
    for name, shift in (("last", 0.0), ("first", 0.1)):
        folder = tmp_path / name
        folder.mkdir()
        for k in range(3):
            values = values_of(k, arc=choice(0.5 + 0.1 * k + shift))
            (folder / f"family_k{k}.json").write_text(json.dumps(values))
        (folder / "other.json").write_text("{}")
    return tmp_path / "last", tmp_path / "first"


def test_two_sweeps_are_compared(two_sweeps, tmp_path, capsys):
    main([*map(str, two_sweeps), "--save_directory", str(tmp_path / "out")])
    report = (tmp_path / "out" / "summary.md").read_text()
    assert report in capsys.readouterr().out
    for name in ("last: student", "last: k = 1", "first: k = 1", "first: teacher"):
        assert f"\n| {name} |" in report
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = {(row["sweep"], row["num_layers_to_patch"]): row for row in csv.DictReader(file)}
    assert float(rows["last", "1"]["value"]) == pytest.approx(0.6)
    assert float(rows["first", "1"]["value"]) == pytest.approx(0.7)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [model["sweep"] for model in summary["models"]] == ["first"] * 3 + ["last"] * 3
    svg = (tmp_path / "out" / "summary.svg").read_text()
    assert "first: interpolated" in svg and "last: interpolated" in svg
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_on_one_sweep_is_written_into_its_folder(two_sweeps):
    main([str(two_sweeps[0])])
    report = (two_sweeps[0] / "summary.md").read_text()
    assert "| k = 1 |" in report
    main([str(two_sweeps[0])])  # the files of a report are not taken for results
    assert (two_sweeps[0] / "summary.md").read_text() == report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{last}", "{first}"], "several sweeps: name a folder for the report"),
        (["{last}", "/no/such/folder", "--save_directory", "{out}"], "there is no such folder"),
        (["{out}"], "there are no results in it"),
    ],
)
def test_bad_input_ends_in_one_line(two_sweeps, tmp_path, capsys, words, message):
    (tmp_path / "out").mkdir()
    places = {"last": two_sweeps[0], "first": two_sweeps[1], "out": tmp_path / "out"}
    with pytest.raises(SystemExit) as ended:
        main([word.format(**places) for word in words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_failures_are_in_the_report(tmp_path):
    report = write_report([result(0, arc=ARC)], tmp_path, {"gsm8k": "ConnectionError: offline"})
    assert "- gsm8k: ConnectionError: offline" in report
