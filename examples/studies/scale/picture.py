"""The picture of the study: KL against parameters, a row for each pair, a column for each order."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from examples.studies.claims.picture import draw_line
from patching.files.plot import LOOKS

LINES = {"plain": "as is", "one": "one factor of 1.2", "matched": "matched scale"}


def draw(pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw means over seeds, with the standard deviation over seeds as error bars."""
    orders = list(pairs[0]["orders"])
    size = (3.4 * len(orders) + 0.4, 2.9 * len(pairs))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(pairs), len(orders), squeeze=False)
    for row, found in zip(grid, pairs):
        millions = [count / 1e6 for count in found["parameters"]]
        ends = [found[end]["kl"] for end in ("student", "teacher")]
        for axes, order in zip(row, orders):
            sizes = found["orders"][order]["sizes"]
            for (name, label), (color, line, marker) in zip(LINES.items(), LOOKS):
                values = [ends[0], *(of_size["kl"][name] for of_size in sizes), ends[1]]
                style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4}
                draw_line(axes, dict(zip(millions, values)), label, style)
            axes.set_title(f"{found['pair']}, {order}", fontsize=9)
            axes.set_xlabel("parameters (millions)", fontsize=8)
            axes.set_ylabel("KL, nats per token", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=7)
    return figure
