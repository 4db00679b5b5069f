"""Scores against parameters: first the averages, then one small panel per task. Pages have one
legend each, and can be read without colors.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from evaluate.reporting.comparison import Comparison
from evaluate.reporting.scores import (
    FAMILY_SERIES,
    Score,
    averages,
    tasks_of_averages,
)
from evaluate.result import Result

matplotlib.use("Agg")

COLORS = ("#08306b", "#d95f02", "#3f8f3f", "#8856a7", "#555555")
SECOND_COLORS = ("#4aa3df", "#e6ab02", "#a6761d", "#e7298a", "#1b9e77")
"""For the sixth series and those after it, whose lines and markers are drawn a second time, hollow.
"""
LINES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
MARKERS = ("o", "^", "v", "D", "p")
LONE_COLORS = ("#b2182b", "#1b7837", "#2166ac", "#8c510a", "#762a83")
LONE_MARKERS = ("P", "X", "h", "d", "<", ">")
"""Markers of compared models, which are points without a line."""

PANEL_INCHES = (3.6, 2.9)
MAX_PANELS = 30
"""Panels of a page."""


class Panel(NamedTuple):
    title: str
    scores: list[Score | None]
    """One for each result."""

    @property
    def label(self) -> str:
        score = next(score for score in self.scores if score is not None)
        return f"{score.metric} ({'higher' if score.higher_is_better else 'lower'} is better)"

    @property
    def is_logarithmic(self) -> bool:
        """Pruning without distillation takes perplexities to a million."""
        return any(score is not None and "perplexity" in score.metric for score in self.scores)


def plot(comparison: Comparison) -> list[Figure]:
    """Pages of panels, with parameters counting embedding and head both."""
    panels = list(panels_of(comparison))
    styles = _styles(comparison.results)
    return [
        _page(comparison.results, panels[start : start + MAX_PANELS], styles)
        for start in range(0, max(1, len(panels)), MAX_PANELS)
    ]


def panels_of(comparison: Comparison) -> Iterator[Panel]:
    """Averages of several tasks, then all tasks. Titles have the marks of the tables."""
    tasks = tasks_of_averages(comparison.results)
    for name, scores in averages(comparison.results).items():
        if len(tasks[name]) > 1 and any(scores):
            marks = comparison.marks_of(tasks[name])
            yield Panel(f"average of {len(tasks[name])}: {name}{marks}", scores)
    for task in comparison.usual:
        scores = [of_model.get(task) for of_model in comparison.shown]
        yield Panel(f"{task}{comparison.marks_of([task])}", scores)


def _page(results: Sequence[Result], panels: Sequence[Panel], styles: dict[str, dict]) -> Figure:
    num_columns = 3 if len(panels) <= 9 else 4 if len(panels) <= 16 else 5
    num_columns = max(1, min(num_columns, len(panels)))
    num_rows = max(1, -(-len(panels) // num_columns))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.8), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    billions = max(result.parameters.both_counted for result in results) >= 1e9
    handles, ends = {}, {}
    for axes, panel in zip(all_axes, panels):
        for name, style in styles.items():
            members = [
                (result, score)
                for result, score in zip(results, panel.scores)
                if result.series_label == name and score is not None
            ]
            if members:
                handles[name] = _draw(axes, members, style, 1e9 if billions else 1e6)
                if members[0][0].series in FAMILY_SERIES:
                    ends |= _mark_ends(axes, members, 1e9 if billions else 1e6)
        axes.set_title(panel.title, fontsize=10)
        axes.set_ylabel(panel.label, fontsize=8)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.25)
        if panel.is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # 60, not 6 x 10^1
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axes in all_axes[max(0, len(panels) - num_columns) : len(panels)]:  # the lowest ones
        axes.set_xlabel(f"parameters ({'billions' if billions else 'millions'})", fontsize=8)
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


def _draw(axes, members: Sequence[tuple[Result, Score]], style: dict, unit: float):
    """Draw a series with its standard errors. Return its handle for the legend."""
    members = sorted(members, key=lambda member: member[0].parameters.both_counted)
    errors = [score.stderr or 0.0 for _, score in members]
    errors = [error if math.isfinite(error) else 0.0 for error in errors]
    return axes.errorbar(
        [result.parameters.both_counted / unit for result, _ in members],
        [score.value for _, score in members],
        yerr=errors if any(errors) else None,
        capsize=2,
        elinewidth=0.8,
        label=members[0][0].series_label,
        **style,
    )


def _styles(results: Sequence[Result]) -> dict[str, dict]:
    """A style for each series. Line, marker and fill differ as well as color."""
    names = {result.series_label: result.series for result in results}
    lines, points = [], []
    for name, series in names.items():
        (points if series.startswith("compare_") else lines).append(name)
    looks = [
        {"color": color, "linestyle": line, "marker": marker, "fillstyle": fill, "markersize": 5}
        for fill, colors in (("full", COLORS), ("none", SECOND_COLORS))
        for color, line, marker in zip(colors, LINES, MARKERS)
    ]
    styles = {name: looks[i % len(looks)] for i, name in enumerate(lines)}
    for i, name in enumerate(points):
        styles[name] = {
            "color": LONE_COLORS[i % len(LONE_COLORS)],
            "linestyle": "none",
            "marker": LONE_MARKERS[i % len(LONE_MARKERS)],
            "markersize": 8,
        }
    return styles


def _mark_ends(axes, members: Sequence[tuple[Result, Score]], unit: float) -> dict:
    """Draw student and teacher with markers of their own. Return these by their legend labels."""
    handles = {}
    ends = {"student": (0, "s", 8), "teacher": (members[0][0].max_layers_to_patch, "*", 13)}
    for name, (k, marker, size) in ends.items():
        for result, score in members:
            if result.num_layers_to_patch == k:
                (handles[name],) = axes.plot(
                    result.parameters.both_counted / unit,
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
