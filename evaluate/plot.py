"""Score against parameters, one small panel per task. It can be read without colors."""

from collections.abc import Sequence
from itertools import product

import matplotlib
from matplotlib.figure import Figure

from evaluate.result import Result
from evaluate.scores import FAMILY_SERIES, Score, main_scores

matplotlib.use("Agg")

COLORS = ("#08306b", "#d95f02", "#3f8f3f", "#8856a7", "#555555")
LINES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
MARKERS = ("o", "^", "v", "D", "p")
LONE_MARKERS = ("P", "X", "h", "d", "<", ">")
"""Markers of compared models, which are points without a line."""

PANEL_INCHES = (3.7, 3.0)
NUM_COLUMNS = 3


def plot(results: Sequence[Result]) -> Figure:
    """The main score of each task against parameters, with embedding and head both counted."""
    tasks = list(dict.fromkeys(task for result in results for task in main_scores(result)))
    num_columns = max(1, min(NUM_COLUMNS, len(tasks)))
    num_rows = max(1, -(-len(tasks) // num_columns))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.6), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    billions = max(result.parameters.both_counted for result in results) >= 1e9
    unit = 1e9 if billions else 1e6
    styles = _styles(results)
    handles, ends = {}, {}
    for axes, task in zip(panels, tasks):
        for name, style in styles.items():
            members = [
                result
                for result in results
                if result.series_label == name and task in main_scores(result)
            ]
            if not members:
                continue
            members.sort(key=lambda result: result.parameters.both_counted)
            x = [result.parameters.both_counted / unit for result in members]
            scores = [main_scores(result)[task] for result in members]
            errors = [score.stderr or 0.0 for score in scores]
            handles[name] = axes.errorbar(
                x,
                [score.value for score in scores],
                yerr=errors if any(errors) else None,
                capsize=2,
                elinewidth=0.8,
                label=name,
                **style,
            )
            if members[0].series in FAMILY_SERIES:
                ends |= _mark_ends(axes, members, x, scores)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"parameters ({'billions' if billions else 'millions'})", fontsize=8)
        better = "higher" if scores[0].higher_is_better else "lower"
        axes.set_ylabel(f"{scores[0].metric} ({better} is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    handles |= ends
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 3 * num_columns // 2 + 1) or 1,
        fontsize=8,
        frameon=False,
    )
    return figure


def _styles(results: Sequence[Result]) -> dict[str, dict]:
    """A style for each series. Line, marker and fill differ as well as color."""
    names = {result.series_label: result.series for result in results}
    lines, points = [], []
    for name, series in names.items():
        (points if series.startswith("compare_") else lines).append(name)
    looks = [
        {"color": color, "linestyle": line, "marker": marker, "fillstyle": fill, "markersize": 5}
        for fill, (color, line, marker) in product(("full", "none"), zip(COLORS, LINES, MARKERS))
    ]
    styles = {name: looks[i % len(looks)] for i, name in enumerate(lines)}
    for i, name in enumerate(points):
        styles[name] = {
            "color": "#666666",
            "linestyle": "none",
            "marker": LONE_MARKERS[i % len(LONE_MARKERS)],
            "markersize": 7,
        }
    return styles


def _mark_ends(axes, members: Sequence[Result], x: Sequence[float], scores: Sequence[Score]):
    """Draw student and teacher with markers of their own. Return these by their legend labels."""
    handles = {}
    ends = {"student": (0, "s", 8), "teacher": (members[0].max_layers_to_patch, "*", 13)}
    for name, (k, marker, size) in ends.items():
        for result, position, score in zip(members, x, scores):
            if result.num_layers_to_patch == k:
                (handles[name],) = axes.plot(
                    position,
                    score.value,
                    marker=marker,
                    markersize=size,
                    color="black",
                    markerfacecolor="white" if name == "student" else "black",
                    linestyle="none",
                    label=name,
                    zorder=5,
                )
    return handles
