"""The picture of the study: on chats and on text, by number of layers."""

from matplotlib.figure import Figure

from examples.studies.chats.findings import LABELS
from examples.studies.claims.findings import Lines
from examples.studies.claims.picture import draw_panel

AXES = {
    "exact_match": "exact match on chats (higher is better)",
    "bits_per_byte": "bits per byte of text (lower is better)",
}
PANELS = (
    ("What a student is distilled on", "exact_match", ("two_phases", "text", "chats")),
    ("The same, on text", "bits_per_byte", ("two_phases", "text", "chats")),
    ("Weight delta", "exact_match", ("two_phases", "delta_to_chat", "base_in_chat")),
    ("Teacher apart", "exact_match", ("delta_to_apart", "base_in_apart")),
)


def draw(scores: dict[str, Lines]) -> Figure:
    """Draw the standard deviation over seeds as error bars."""
    figure = Figure(figsize=(4 * len(PANELS), 3.4), layout="constrained")
    for axes, (title, score, sweeps) in zip(figure.subplots(1, len(PANELS)), PANELS):
        labels = {sweep: LABELS[sweep] for sweep in sweeps}
        draw_panel(axes, title, AXES[score], scores[score], labels)
    return figure
