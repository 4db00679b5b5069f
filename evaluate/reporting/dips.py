"""Dips: where a family's score on a task gets worse from one size to the next."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from evaluate.reporting.paired import Difference, difference, holm
from evaluate.reporting.scores import FAMILY_SERIES, Score, main_scores
from evaluate.result import Result

LEVEL = 0.05
"""The chance of marking any dip of a series, if in truth there is none."""


@dataclass(frozen=True)
class Dip:
    """A score that is worse than that of the next smaller size."""

    smaller: Result
    result: Result
    before: Score
    score: Score
    difference: Difference
    corrected_p: float | None
    """p, corrected for all comparisons of the series, dips or not. None if it is not known."""

    @property
    def is_significant(self) -> bool | None:
        """None if that is not known."""
        return None if self.corrected_p is None else self.corrected_p < LEVEL


def dips(results: Iterable[Result]) -> list[Dip]:
    """All dips of all families, each tested against all comparisons of neighboring sizes."""
    by_series: dict[tuple[str | None, str], list[Result]] = {}
    for result in results:
        if result.series in FAMILY_SERIES:
            by_series.setdefault((result.sweep, result.series), []).append(result)
    return [dip for members in by_series.values() for dip in _dips_of(members)]


def _dips_of(members: list[Result]) -> list[Dip]:
    members = sorted(members, key=lambda result: result.num_layers_to_patch)
    compared = []
    for smaller, result in pairwise(members):
        before = main_scores(smaller)
        for task, score in main_scores(result).items():
            if task in before and before[task].key == score.key:
                found = difference(smaller, result, before[task], score)
                compared.append((smaller, result, before[task], score, found))
    tested = [i for i, (*_, found) in enumerate(compared) if found.p is not None]
    corrected = dict(zip(tested, holm([compared[i][-1].p for i in tested])))
    return [
        Dip(*comparison, corrected.get(i))
        for i, comparison in enumerate(compared)
        if comparison[-1].value * (1 if comparison[3].higher_is_better else -1) < 0
    ]
