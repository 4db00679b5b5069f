"""A plot of the loss and its terms over the steps of a run, and of the cosine term by depth. Steps
of chats have another background.
"""

from itertools import count, takewhile
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from train.chats.phase_log import chat_steps, phase_lines
from train.loss_weights import TERMS


def plot_terms(log: list[dict[str, Any]], path: Path) -> None:
    """Plot one panel per term from a Trainer's log: training as a line, held-out rows as dots. One
    more panel has the cosine term of each hidden state that is compared.
    """
    names = [name for name in ("loss", *TERMS) if any(name in line for line in log)]
    states = list(takewhile(lambda j: any(f"cosine_{j}" in line for line in log), count()))
    num_panels = max(len(names) + bool(states), 1)
    figure = Figure(figsize=(4 * num_panels, 3), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes, name in zip(panels, names):
        for key, style, label in (
            (name, "-", "training"),
            (f"eval_{name}", "o", "held out"),
            (f"eval_chat_{name}", "s", "held-out chats"),
        ):
            if points := _points(log, key):
                axes.plot(*zip(*points), style, label=label, markersize=4)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    if states:
        axes = panels[-1]
        for j in states:
            label = f"after {j} layers" if j in (0, states[-1]) else None
            shade = colormaps["viridis"](j / max(states[-1], 1))
            axes.plot(*zip(*_points(log, f"cosine_{j}")), color=shade, label=label)
        axes.set(title="cosine by student depth", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    if phases := phase_lines(log):
        figure.suptitle("; ".join(phases), fontsize="medium")
        for axes in panels:
            axes.axvspan(*chat_steps(log), color="tab:orange", alpha=0.1, zorder=0)
    figure.savefig(path)


def _points(log: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in log if key in line]
