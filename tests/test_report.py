"""Tables and plots from stored results."""

import csv
import json
import math
import os
from dataclasses import replace
from itertools import pairwise

import pytest
from limits import bounded

from evaluate.report import main, report_files, short_names
from evaluate.reporting.comparison import Comparison
from evaluate.reporting.exports import csv_table
from evaluate.reporting.plot import plot
from evaluate.reporting.scores import (
    averages,
    kind_of,
    leaves_of,
    main_scores,
    scores_of,
    subtasks_of,
)
from evaluate.reporting.tables import markdown_report
from evaluate.result import FinishedTask, Result, Run, check_result


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
IFEVAL = {"prompt_level_strict_acc,none": 0.3, "prompt_level_strict_acc_stderr,none": 0.02}
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


def test_groups_of_many_ways_and_of_great_depth_are_walked_once():
    """Each of 40 groups contains the next twice, and the 3,000 after them are a chain."""
    stored = result(0, choice=choice(0.4), g0=choice(0.3), end=choice(0.2))
    names = [f"g{i}" for i in range(3040)]
    stored.group_subtasks = {a: [b, b] for a, b in pairwise(names[:41])}
    stored.group_subtasks |= {a: [b] for a, b in pairwise(names[40:])}
    stored.group_subtasks |= {"choice": ["g0"], names[-1]: ["end"]}
    with bounded(60):
        check_result(stored)
        assert list(main_scores(stored)) == ["choice"]
        assert leaves_of(stored, "choice") == ["end"]
        assert "| choice | acc ↑ |" in text_of([stored])


def test_tasks_inside_a_group_are_in_their_order():
    stored = result(0)
    stored.group_subtasks = {"a": ["b", "c"], "b": ["d", "e"], "c": ["e", "f"], "e": []}
    assert list(subtasks_of(stored, "a")) == ["b", "d", "e", "c", "f"]


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


def test_scores_of_different_scales_are_not_averaged():
    """truthfulqa_gen's bleu_max is out of 100, and its bleu_acc a share."""
    bleu = {"bleu_max,none": 27.1, "bleu_max_stderr,none": 0.8}
    stored = result(0, truthful=bleu, gsm=GSM, boolq=choice(0.9), ifeval=IFEVAL)
    stored.configs = {
        task: {"output_type": "generate_until"} for task in ("truthful", "gsm", "ifeval")
    }
    found = {name: score.value for name, (score,) in averages([stored]).items()}
    assert found == pytest.approx(
        {"classification": 0.9, "generation": (0.1 + 0.3) / 2, "generation (bleu_max)": 27.1}
    )


def test_a_task_asked_for_by_name_is_shown_beside_its_group_and_averaged_once():
    stored = result(0, mmlu=choice(0.4), algebra=choice(0.2), physics=choice(0.6), arc=ARC)
    stored.group_subtasks = {"mmlu": ["algebra", "physics"]}
    stored.tasks = dict.fromkeys(("algebra", "mmlu", "arc"), FinishedTask(1.0, False))
    assert list(main_scores(stored)) == ["mmlu", "algebra", "arc"]
    (average,) = averages([stored])["classification"]
    assert average.value == pytest.approx((0.4 + 0.6) / 2)


def test_tasks_are_rows_and_sizes_columns():
    rows = [
        result(0, arc=ARC),
        result(1, arc=ARC),
        result(2, arc=ARC),
        result(1, "naive", arc=ARC),
        result(None, "compare_small", wikitext=WIKITEXT),
    ]
    for row in rows:
        row.n_samples = {task: {"original": 2376, "effective": 100} for task in row.results}
        row.n_shot, row.versions = dict.fromkeys(row.results, 25), dict.fromkeys(row.results, 1.0)
    report = markdown_report(Comparison.of(rows), {}, num_pages=1)
    assert "![Scores against parameters](summary.png)" in report
    scores = report.partition("## Scores")[2].partition("## Dips")[0]
    lines = scores.splitlines()
    headers = [line for line in lines if line.startswith("| task ")]
    conditions = "| task | metric | few-shot | documents | version |"
    assert headers == [
        f"{conditions} student | k = 1 | teacher |",
        f"{conditions} naively pruned, k = 1 |",
        f"{conditions} small |",
    ]
    assert lines[lines.index(headers[0]) + 2 :][:2] == [
        "| layers |  |  |  |  | 4 | 5 | 6 |",
        "| parameters |  |  |  |  | 1.00 B | 1.10 B | 1.20 B |",
    ]
    arc = "| arc | acc_norm ↑ | 25 | 100 of 2,376 | 1.0 |"
    assert f"{arc} 0.6000 ± 0.0400 ‡ | 0.6000 ± 0.0400 ‡ | 0.6000 ± 0.0400 ‡ |" in lines
    assert "| wikitext | bits_per_byte ↓ | 25 | 100 of 2,376 | 1.0 | 0.7500 ‡ |" in lines
    assert "‡ marks unverified scores" in scores


def test_many_sizes_take_several_tables():
    rows = [replace(result(k, arc=ARC), max_layers_to_patch=17) for k in range(18)]
    report = markdown_report(Comparison.of(rows), {}, num_pages=2)
    headers = [line for line in report.splitlines() if line.startswith("| task | metric")]
    assert [line.count("|") - 1 for line in headers] == [5 + 9, 5 + 9]
    assert "(summary.png)" in report and "(summary_2.png)" in report


SOURCES = {"task config": "c", "prompts": "p", "documents": "d", "lm_eval": "0.4.13"}


def verified(k, series="family", sweep=None, limit=None, sources=SOURCES, **tasks):
    found = replace(result(k, series, **tasks), sweep=sweep)
    run = Run({"limit": limit, "seed": [0, 1, 2, 3], "dtype": "float32"}, {}, {"torch": "2.13.0"})
    found.runs = {run.name: run}
    for task in tasks:
        found.tasks[task] = FinishedTask(1.0, False, sources, [task], run.name)
        found.n_samples[task] = {"original": 100, "effective": int(limit or 100)}
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"limit": 10.0}, "limit 10, not none, number of documents 10 of 100, not 100"),
        ({"sources": SOURCES | {"prompts": "q"}}, "other prompts"),
        ({"sources": SOURCES | {"lm_eval": "0.4.9"}}, "lm_eval 0.4.9, not 0.4.13"),
    ],
)
def test_scores_measured_under_other_conditions_are_marked(changes, words):
    rows = [verified(k, sweep="a", arc=ARC) for k in (0, 1, 2)]
    rows.append(verified(1, sweep="b", arc=ARC, **changes))
    report = markdown_report(Comparison.of(rows), {}, num_pages=1)
    assert report.count("0.6000 ± 0.0400 † |") == 2  # its score and its average
    assert f"- b: k = 1 on arc: {words}" in report
    assert "Measured with limit none, dtype float32, seed 0,1,2,3, lm_eval 0.4.13" in report
    lines = [line for line in csv_table(rows).splitlines() if line.startswith("b,")]
    assert [",10 of 100," in line for line in lines] == ["limit" in words] * 2  # two metrics
    unmarked = markdown_report(Comparison.of(rows[:3]), {}, num_pages=1)
    assert "†" not in unmarked and "‡" not in unmarked


def test_every_table_of_scores_says_how_they_were_measured():
    rows = [verified(k, arc=choice(0.5 - k / 10)) for k in (0, 1, 2)]
    report = markdown_report(Comparison.of(rows), {}, num_pages=1)
    sections = {part.splitlines()[0]: part for part in report.split("## ") if part.strip()}
    for name in ("Averages", "Scores"):
        assert "limit none" in sections[name] and "lm_eval 0.4.13" in sections[name]
    assert "few-shot" in sections["Averages"] and "documents 100" in sections["Averages"]
    assert "documents | few-shot" in sections["Dips"]
    assert "(not paired)" in sections["Dips"]  # no scores of single documents are kept


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_the_plot_has_a_panel_per_task_and_marks_the_ends(num_tasks):
    tasks = {f"task{i}": ARC for i in range(num_tasks)}
    rows = [verified(k, **tasks) for k in range(3)]
    rows += [result(1, "naive", **tasks), verified(None, series="compare_small", **tasks)]
    (figure,) = plot(Comparison.of(rows))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title() for axes in panels]
    averages_first = ["average of 4: classification ‡"] if num_tasks > 1 else []
    assert titles == averages_first + [f"{task} ‡" for task in tasks]  # naive is unverified
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"interpolated", "naively pruned", "student", "teacher", "small"}
    assert panels[-1].get_xlabel() == "parameters (billions)"


def test_many_tasks_take_several_pages_with_one_legend_each():
    rows = [result(k, **{f"task{i}": ARC for i in range(40)}) for k in range(2)]
    pages = plot(Comparison.of(rows))
    assert [len(page.axes) for page in pages] == [30, 12]
    visible = [[axes for axes in page.axes if axes.get_visible()] for page in pages]
    assert [len(axes) for axes in visible] == [30, 11]  # with the average
    assert [len(page.legends) for page in pages] == [1, 1]


def test_perplexities_have_a_logarithmic_axis_and_bits_do_not():
    values = {"word_perplexity,none": 1e6, "word_perplexity_stderr,none": "N/A"}
    rows = [verified(k, a=values, wikitext=WIKITEXT, arc=ARC) for k in (0, 1)]
    (figure,) = plot(Comparison.of(rows))
    scales = {axes.get_title(): axes.get_yscale() for axes in figure.axes if axes.get_visible()}
    assert scales == {"a": "log", "wikitext": "linear", "arc": "linear"}
    (perplexity,) = (axes for axes in figure.axes if axes.get_yscale() == "log")
    assert perplexity.yaxis.get_major_formatter()(100.0) == "100"


def test_compared_models_differ_in_shape_and_color():
    rows = [result(None, f"compare_{i}", arc=ARC) for i in range(12)]
    (figure,) = plot(Comparison.of(rows))
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == 12


def test_series_differ_without_colors():
    rows = [
        replace(result(k, series, arc=ARC), sweep=sweep)
        for sweep in "abc"
        for series in ("family", "naive")
        for k in (0, 1)
    ]
    containers = plot(Comparison.of(rows))[0].axes[0].containers
    looks = [
        (line.get_linestyle(), line.get_marker(), line.get_fillstyle())
        for line in (container.lines[0] for container in containers)
    ]
    assert len(looks) == 6 == len(set(looks))
    assert len({container.lines[0].get_color() for container in containers}) == 6


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


def text_of(results, failures=None) -> str:
    return report_files(results, failures)["summary.md"].decode()


def test_failures_are_in_the_report():
    report = text_of([result(0, arc=ARC)], {"gsm8k": "ConnectionError: offline"})
    assert "- gsm8k: ConnectionError: offline" in report


def test_a_report_without_scores_says_so():
    report = text_of([result(0)], {"gsm8k": "ConnectionError: offline"})
    assert "No task has a score." in report and "not known" not in report


NOT_JSON = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_scores_that_are_no_number_are_in_the_report(value):
    """lm-eval finds such ones: a perplexity may overflow."""
    stderr = 1.0 if math.isfinite(value) else value
    bad = {"word_perplexity,none": value, "word_perplexity_stderr,none": stderr}
    good = {"word_perplexity,none": 20.0, "word_perplexity_stderr,none": 0.5}
    members = [result(k, text=bad if k else good) for k in range(2)]
    for member in members:
        check_result(member)
        member.higher_is_better["text"] = {"word_perplexity": False}
    files = report_files(members)
    _, model = json.loads(files["summary.json"], **NOT_JSON)["models"]
    assert model["scores"]["text"]["value"] == (value if value < math.inf else None)
    report = files["summary.md"].decode()
    assert ("| k = 1 ▼ | text |" in report) == (value > 20)
    assert max(map(len, report.splitlines())) < 400
    assert files["summary.png"].startswith(b"\x89PNG")


def test_names_that_are_not_unicode_are_written_as_escapes(tmp_path):
    """Names of files may be any bytes, and a damaged result may hold any text."""
    folders = [tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "tea"]
    for folder in folders:
        folder.mkdir()
        values = values_of(None, "compare_\ud800", **{"a\udfff": choice(0.5), "arc": ARC})
        (folder / "compare_x.json").write_text(json.dumps(values))
        (folder / "failures.json").write_text(json.dumps({"b\ud800": "no file caf\udce9"}))
    out = tmp_path / "out"
    main([*map(str, folders), "--save_directory", str(out)])
    report = (out / "summary.md").read_text()
    assert "| caf\\udce9: \\ud800 |" in report and "| a\\udfff |" in report
    assert "- tea: b\\ud800: no file caf\\udce9" in report
    assert "caf\\udce9: \\ud800" in (out / "summary.csv").read_text()
    assert (out / "summary.svg").is_file()


def test_nothing_is_written_where_a_further_page_of_plots_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluate.reporting.plot.MAX_PANELS", 1)
    values = values_of(0, arc=ARC, wikitext=WIKITEXT)
    (tmp_path / "family_k0.json").write_text(json.dumps(values))
    (tmp_path / "summary_2.png").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert "summary_2.png is a folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"family_k0.json", "summary_2.png"}
