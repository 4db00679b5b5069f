"""Results of a sweep as a table (Markdown and CSV) and a plot of score against parameters (PNG and
SVG).
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from patching.outputs import write_text

PREFERRED_METRICS = ("acc_norm", "exact_match", "acc", "bits_per_byte", "word_perplexity")
"""A task's metric for the table and the plot: the first of these it has, else its first."""

LABELS = {"family": "interpolated", "naive": "naively pruned"}
LINE_STYLES = {
    "family": {"color": "#0b5394", "marker": "o", "linestyle": "-"},
    "naive": {"color": "#b45f06", "marker": "^", "linestyle": "--"},
}


@dataclass(frozen=True)
class Score:
    """One metric of one task; `stderr` is None where lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool


def scores_of(result: dict[str, Any]) -> list[Score]:
    """All scores in a stored result, tasks and metrics in lm-eval's order.

    Metrics are named as lm-eval does, with the filter behind where it is not `none`:
    `exact_match,strict-match`."""
    scores = []
    for task, values in result["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            higher = result.get("higher_is_better", {}).get(task, {}).get(metric, True)
            scores.append(
                Score(
                    task,
                    metric if filter_name == "none" else key,
                    float(value),
                    stderr if isinstance(stderr, float) else None,  # lm-eval writes "N/A"
                    higher is not False,
                )
            )
    return scores


def main_scores(result: dict[str, Any]) -> dict[str, Score]:
    """The score of each task that the table and the plot show."""
    by_task: dict[str, list[Score]] = {}
    for score in scores_of(result):
        by_task.setdefault(score.task, []).append(score)

    def rank(score: Score) -> int:
        base = score.metric.partition(",")[0]
        return (
            PREFERRED_METRICS.index(base) if base in PREFERRED_METRICS else len(PREFERRED_METRICS)
        )

    return {task: min(scores, key=rank) for task, scores in by_task.items()}


def write_report(results: Sequence[dict[str, Any]], folder: Path) -> str:
    """Write summary.md, summary.csv, summary.png and summary.svg; return the Markdown table."""
    results = sorted(results, key=_position)
    table = markdown_table(results)
    write_text(folder / "summary.md", table)
    write_text(folder / "summary.csv", csv_table(results))
    figure = plot(results)
    for suffix in ("png", "svg"):
        staged = folder / f".summary.{suffix}"
        figure.savefig(staged, format=suffix, dpi=150)
        staged.replace(folder / f"summary.{suffix}")
    return table


def _position(result: dict[str, Any]) -> tuple[int, bool]:
    return result["num_layers_to_patch"], result["series"] != "family"


def name_of(result: dict[str, Any]) -> str:
    """What a row is called: student, k = 1, ..., teacher, or a baseline at k."""
    k = result["num_layers_to_patch"]
    if result["series"] != "family":
        return f"{LABELS[result['series']]}, k = {k}"
    if k == result["max_layers_to_patch"]:
        return "teacher" if k else "student = teacher"
    return f"k = {k}" if k else "student"


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """One row per model: layers, parameters both ways, and each task's main score with its standard
    error.
    """
    columns = main_scores(results[0])
    header = ["model", "layers", "parameters", "stored"] + [
        f"{task} ({score.metric} {'↑' if score.higher_is_better else '↓'})"
        for task, score in columns.items()
    ]
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    for result in results:
        cells = [
            name_of(result),
            str(result["depth"]),
            count_text(result["parameters"]["both_counted"]),
            count_text(result["parameters"]["stored"]),
        ]
        scores = main_scores(result)
        for task in columns:
            score = scores[task]
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            cells.append(f"{score.value:.4f}{error}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def csv_table(results: Sequence[dict[str, Any]]) -> str:
    """One row per model and metric, every metric of every task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "series",
            "num_layers_to_patch",
            "depth",
            "parameters_both_counted",
            "parameters_stored",
            "task",
            "metric",
            "value",
            "stderr",
        ]
    )
    for result in results:
        for score in scores_of(result):
            writer.writerow(
                [
                    result["series"],
                    result["num_layers_to_patch"],
                    result["depth"],
                    result["parameters"]["both_counted"],
                    result["parameters"]["stored"],
                    score.task,
                    score.metric,
                    score.value,
                    "" if score.stderr is None else score.stderr,
                ]
            )
    return text.getvalue()


def count_text(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def plot(results: Sequence[dict[str, Any]]) -> Figure:
    """Main score of each task against parameters, one panel a task, one line a series."""
    tasks = list(main_scores(results[0]))
    num_columns = min(3, len(tasks))
    num_rows = -(-len(tasks) // num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.7 * num_rows), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in all_axes[len(tasks) :]:
        axes.set_visible(False)
    billions = max(result["parameters"]["both_counted"] for result in results) >= 1e9
    unit = 1e9 if billions else 1e6
    for axes, task in zip(all_axes, tasks):
        for series in LABELS:
            members = [result for result in results if result["series"] == series]
            if not members:
                continue
            x = [result["parameters"]["both_counted"] / unit for result in members]
            scores = [main_scores(result)[task] for result in members]
            axes.errorbar(
                x,
                [score.value for score in scores],
                yerr=[score.stderr or 0.0 for score in scores],
                capsize=2,
                markersize=5,
                label=LABELS[series],
                **LINE_STYLES[series],
            )
            if series == "family":
                _mark_ends(axes, members, x, scores)
        axes.set_title(task)
        axes.set_xlabel(f"parameters ({'billions' if billions else 'millions'})")
        better = "higher" if scores[0].higher_is_better else "lower"
        axes.set_ylabel(f"{scores[0].metric} ({better} is better)")
        axes.grid(alpha=0.25)
    all_axes[0].legend(fontsize=8)
    return figure


def _mark_ends(axes, members: list[dict[str, Any]], x: list[float], scores: list[Score]) -> None:
    """Student and teacher with markers of their own."""
    ends = {"student": (0, "s"), "teacher": (members[0]["max_layers_to_patch"], "*")}
    for name, (k, marker) in ends.items():
        for result, position, score in zip(members, x, scores):
            if result["num_layers_to_patch"] == k:
                axes.plot(
                    position,
                    score.value,
                    marker=marker,
                    markersize=9 if name == "student" else 14,
                    color="black",
                    linestyle="none",
                    label=name,
                    zorder=5,
                )
