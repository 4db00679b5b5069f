"""Small line plots that are readable without color, and figures saved whole or not at all."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

LOOKS = (
    ("#08306b", "-", "o"),
    ("#d95f02", "--", "^"),
    ("#3f8f3f", ":", "v"),
    ("#8856a7", "-.", "D"),
    ("#a50f15", (0, (6, 2, 1, 2, 1, 2)), "p"),
    ("#555555", (0, (1, 3)), "X"),
)
"""Color, line style and marker."""


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> Figure:
    """Plot named lines of (x, y) points. Lines that coincide become one, labeled with all names."""
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, points in lines.items():
        names.setdefault(tuple(points), []).append(name)
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for (points, of_line), (color, line, marker) in zip(names.items(), cycle(LOOKS)):
        label = " = ".join(of_line)
        axes.plot(
            *zip(*points), color=color, linestyle=line, marker=marker, markersize=5, label=label
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the suffix, next to `path`, then rename it."""
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, format=path.suffix.removeprefix("."), dpi=150)
    staged.replace(path)
