"""Ratios of two sides that take turns in a benchmark, as text."""

import statistics
from collections.abc import Sequence


def ratio_of_pairs(ratios: Sequence[float]) -> str:
    """The median ratio, followed by the ratio of every round."""
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"ratio {statistics.median(ratios):.2f} (each pair: {each})"
