"""The picture of the study: one panel for each group of claims, bits per byte against layers."""

from collections.abc import Mapping
from itertools import product
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.studies.claims.findings import Lines
from patching.files.plot import LOOKS

PANELS: dict[str, dict[str, str]] = {
    "Pruned without training": {
        "all_terms": "interpolated",
        "all_terms naive": "naive",
        "all_terms block_influence": "block influence",
        "all_terms laco": "LaCo",
    },
    "Student from random weights": {
        "all_terms": "from teacher layers",
        "random": "from random weights",
    },
    "Loss": {
        "all_terms": "CE + KL + cosine",
        "ce": "CE",
        "ce_kl": "CE + KL",
        "cosine": "cosine",
    },
    "Kept layers": {
        "all_terms": "every 2nd",
        "every_3": "every 3rd",
        "every_4": "every 4th",
        "every_5": "every 5th",
    },
    "Distilled on their own": {"all_terms": "interpolated", "own": "own distillation"},
    "Order": {"all_terms": "last", "first": "first", "klpatch": "KLPatch"},
}
"""By title, the lines of each panel and their labels."""


def draw(lines: Lines) -> Figure:
    """Draw the panels that have several lines by now, with the standard deviation over seeds as
    error bars.
    """
    panels = {title: labels for title, labels in PANELS.items() if len(labels.keys() & lines) > 1}
    num_columns = min(3, max(1, len(panels)))
    num_rows = max(1, -(-len(panels) // num_columns))
    size = (3.7 * num_columns + 0.6, 3.3 * num_rows)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, labels) in zip(all_axes, panels.items()):
        draw_panel(axes, title, "bits per byte (lower is better)", lines, labels)
    return figure


def draw_panel(
    axes: Axes, title: str, y_label: str, lines: Lines, labels: Mapping[str, str]
) -> None:
    """Draw those of the labeled lines that are there, by number of layers. When there are no more
    looks, the next lines have open markers.
    """
    looks = product(("full", "none"), LOOKS)
    for (name, label), (fill, (color, line, marker)) in zip(labels.items(), looks):
        style = {"color": color, "linestyle": line, "marker": marker, "markersize": 5}
        style |= {"fillstyle": fill, "linewidth": 1.5 if fill == "full" else 0.8}
        if name in lines:
            draw_line(axes, lines[name], label, style)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layers", fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def draw_line(axes: Axes, line: Mapping[float, list[float]], label: str, style: dict) -> None:
    depths = sorted(line)
    errors = [stdev(line[depth]) if len(line[depth]) > 1 else 0 for depth in depths]
    means = [mean(line[depth]) for depth in depths]
    axes.errorbar(depths, means, yerr=errors, capsize=2, elinewidth=0.8, label=label, **style)
