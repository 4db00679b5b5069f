"""A plot of the loss and its terms over the steps of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from train.loss_weights import TERMS


def plot_terms(log: list[dict[str, Any]], path: Path) -> None:
    """Plot one panel per term from a Trainer's log: training as a line, held-out rows as dots."""
    names = [name for name in ("loss", *TERMS) if any(name in line for line in log)]
    figure = Figure(figsize=(4 * max(len(names), 1), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names):
        for key, style, label in ((name, "-", "training"), (f"eval_{name}", "o", "held out")):
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axes.plot(*zip(*points), style, label=label, markersize=4)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
