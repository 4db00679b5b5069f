"""Tables and plots from stored results."""

import pytest

from evaluate.report import main_scores, markdown_table, plot, scores_of


def result(k, series="family", **tasks):
    return {
        "series": series,
        "num_layers_to_patch": k,
        "max_layers_to_patch": 2,
        "depth": 4 + k,
        "parameters": {"both_counted": (10 + k) * 10**8, "stored": (10 + k) * 10**8},
        "results": tasks,
        "higher_is_better": {"wikitext": {"bits_per_byte": False}, "arc": {"acc": True}},
    }


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


def test_the_table_names_ends_baselines_and_errors():
    rows = [result(0, arc=ARC), result(1, arc=ARC), result(2, arc=ARC), result(1, "naive", arc=ARC)]
    lines = markdown_table(rows).splitlines()
    assert lines[0] == "| model | layers | parameters | stored | arc (acc_norm ↑) |"
    assert lines[2] == "| student | 4 | 1.00 B | 1.00 B | 0.6000 ± 0.0400 |"
    assert [line.split(" |")[0] for line in lines[3:]] == [
        "| k = 1",
        "| teacher",
        "| naively pruned, k = 1",
    ]


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_the_plot_has_a_panel_a_task_and_marks_the_ends(num_tasks):
    tasks = {f"task{i}": ARC for i in range(num_tasks)}
    rows = [result(k, **tasks) for k in range(3)] + [result(1, "naive", **tasks)]
    panels = [axes for axes in plot(rows).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(tasks)
    labels = {text.get_text() for text in panels[0].get_legend().get_texts()}
    assert labels == {"interpolated", "naively pruned", "student", "teacher"}
    assert panels[0].get_xlabel() == "parameters (billions)"
