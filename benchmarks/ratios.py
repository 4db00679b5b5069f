"""How the benchmarks say what two sides that take turns come to."""

import statistics
from collections.abc import Sequence


def ratio_of_pairs(ratios: Sequence[float]) -> str:
    """The median of what was found round by round, and every round's."""
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"ratio {statistics.median(ratios):.2f} (each pair: {each})"
