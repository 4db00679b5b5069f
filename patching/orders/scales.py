"""Search the factor of each run of student layers, by KL from the teacher.

A search starts from the ratio of lengths where each run meets teacher layers. Runs depend on each
other: one that reads a short stream must not write a long one. So it first looks along all of them
at once, and then along one after the other, in the logarithm of the factor: at two steps around the
best factors so far, and at the lowest point of the parabola through the three. In the end a factor
is kept only if its gain over 1 is larger than the standard error of that gain. Gains are paired by
document, because documents differ from each other far more than the two models on one document.

Searches of many sets run in step, so that their models can be measured together. This file is
numbers and one function that measures. It does not import torch.
"""

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import NamedTuple

from patching.blocks import LayerMap
from patching.matched_scale import SetScale
from patching.orders.search import PatchedLayers
from patching.recipe import patched_model

LEAST_STEP = 0.05
"""Smallest first step, as a logarithm."""
LARGEST_FACTOR = 4.0
SWEEPS = 2
"""How often to look along each run at most, if there are several. Steps are half as long each time,
and it ends when they gain nothing beyond the error.
"""

Factors = tuple[float, ...]
"""One factor for each run, in the sequence of the model."""


class Point(NamedTuple):
    """A model to measure: the patched layers, and the factors of its runs of student layers."""

    patched_layers: PatchedLayers
    factors: Factors


RowSums = Sequence[float]
"""A model's KL from the teacher, summed over the tokens of each row of text."""
MeasureRows = Callable[[Collection[Point]], Mapping[Point, RowSums]]
"""Returns a mapping with at least the given models. Raises BudgetSpent if they are too many."""
Search = Generator[list[Factors], Mapping[Factors, RowSums], SetScale | None]


class BudgetSpent(Exception):
    """More models would have to be measured than the budget allows."""


def start_of(run: tuple[int, ...], ratios: Sequence[float]) -> float:
    """Return the factor to start from: the ratio of lengths where the run meets teacher layers, the
    geometric mean if that is at both ends. `ratios[i]` is the one before student layer i.
    """
    first, end = run[0], run[-1] + 1
    met = [ratios[i] for i in (first, end) if 0 < i < len(ratios)]
    if not met or not all(0 < ratio < math.inf for ratio in met):
        return 1.0
    return math.prod(met) ** (1 / len(met))


def paired_gain(before: RowSums, after: RowSums, tokens: Sequence[int]) -> tuple[float, float]:
    """Return how much lower the KL is after than before, in nats per token, and the standard error
    of that over rows. A single row has an infinite error, and what is not finite no gain.
    """
    gains = [x - y for x, y in zip(before, after, strict=True)]
    total, num_rows = sum(tokens), len(tokens)
    gain = sum(gains) / total
    if num_rows < 2 or not math.isfinite(gain):
        return (gain if math.isfinite(gain) else 0.0), math.inf
    # Rows differ in length: the error of a ratio of two sums.
    squares = sum((x - gain * n) ** 2 for x, n in zip(gains, tokens))
    return gain, math.sqrt(squares * num_rows / (num_rows - 1)) / total


def search_scales(
    layer_map: LayerMap,
    sets: Collection[PatchedLayers],
    ratios: Sequence[float],
    measure: MeasureRows,
    tokens: Sequence[int],
) -> list[SetScale]:
    """Return the factors found for each set that has student and teacher layers.

    `tokens` holds the number of tokens in each row of text. If the budget runs out during the
    search, the best factors so far are returned.
    """
    searches: dict[PatchedLayers, Search] = {}
    asked: dict[PatchedLayers, list[Factors]] = {}
    for patched in sets:
        runs = patched_model(layer_map, patched).student_runs
        starts = {run[0]: start_of(run, ratios) for run in runs}
        if patched and starts and patched not in searches:
            searches[patched] = _search(patched, starts, tokens)
            asked[patched] = next(searches[patched])
    found: list[SetScale] = []
    is_spent = False
    while asked:
        points = [Point(patched, factors) for patched, of in asked.items() for factors in of]
        try:
            rows = {} if is_spent else measure(points)
        except BudgetSpent:
            rows, is_spent = {}, True
        answers = {
            patched: {
                factors: rows[Point(patched, factors)]
                for factors in of
                if Point(patched, factors) in rows
            }
            for patched, of in asked.items()
        }
        asked = {}
        for patched, answer in answers.items():
            try:
                asked[patched] = searches[patched].send(answer)
            except StopIteration as stop:
                if stop.value is not None:
                    found.append(stop.value)
    return found


def _search(patched: PatchedLayers, starts: Mapping[int, float], tokens: Sequence[int]) -> Search:
    """Search one set. Yield factors to measure and receive the row sums of each; an answer that
    lacks some ends the search. Return None if the KL of the set as it is is not known.
    """
    plain: Factors = (1.0,) * len(starts)
    known: dict[Factors, RowSums] = {}

    def kl(factors: Factors) -> float:
        return sum(known[factors]) / sum(tokens)

    def ask(wanted: Collection[Factors]) -> Generator[list[Factors], Mapping, bool]:
        missing = [factors for factors in dict.fromkeys(wanted) if factors not in known]
        if missing:
            known.update((yield missing))
        return all(factors in known for factors in wanted)

    def look_along(i: int, at: Factors, step: float) -> Generator[list[Factors], Mapping, Factors]:
        """Return the best factors found that differ from `at` in run i alone."""

        def moved(log_factor: float) -> Factors:
            return (*at[:i], _factor(log_factor), *at[i + 1 :])

        x = math.log(at[i])
        line = [moved(x - step), at, moved(x + step)]
        if (yield from ask(line)):
            lowest = moved(x + step * _lowest(*map(kl, line)))
            line.append(lowest)
            yield from ask([lowest])
        return lowest_of(line)

    def lowest_of(candidates: Collection[Factors]) -> Factors:
        measured = (factors for factors in candidates if factors in known)
        return min(measured, key=lambda factors: (kl(factors), factors))

    def gains(at: Factors, base: Factors) -> bool:
        gain, error = paired_gain(known[base], known[at], tokens)
        return gain > error

    logs = [math.log(start) for start in starts.values()]
    halves, wholes = (tuple(_factor(x * share) for x in logs) for share in (0.5, 1.0))
    yield from ask([plain, halves, wholes])
    if plain not in known or not math.isfinite(kl(plain)):
        return None
    if len(logs) > 1 and wholes in known:
        share = (1 + _lowest(*map(kl, (plain, halves, wholes)))) / 2
        yield from ask([tuple(_factor(x * share) for x in logs)])
    at = lowest_of(known)
    for sweep in range(SWEEPS if len(starts) > 1 else 1):
        before = at
        for i, x in enumerate(logs):
            at = yield from look_along(i, at, max(abs(x) / 2, LEAST_STEP) / 2**sweep)
        if not gains(at, before):
            break
    for i in range(len(logs)):  # what a run gains, given the others
        without = (*at[:i], 1.0, *at[i + 1 :])
        yield from ask([without])
        if without in known and not gains(at, without):
            at = without
    if not gains(at, plain):
        at = plain
    gain, error = paired_gain(known[plain], known[at], tokens)
    factors = dict(zip(starts, at))
    return SetScale(patched, factors, dict(starts), kl(plain), kl(at), error if gain else 0.0)


def _factor(log_factor: float) -> float:
    """Return a factor with two decimals. KL is flat at that scale, and a coarse grid lets members
    share their rescaled tensors.
    """
    bounded = min(max(math.exp(log_factor), 1 / LARGEST_FACTOR), LARGEST_FACTOR)
    return round(bounded, 2)


def _lowest(left: float, middle: float, right: float) -> float:
    """Return where a parabola through three points at -1, 0 and 1 is lowest, at most 2 away. If it
    has no lowest point, that is on the lower side.
    """
    curvature = left - 2 * middle + right
    if not math.isfinite(curvature) or curvature <= 0:
        return 2.0 if right < left else -2.0
    return min(max((left - right) / (2 * curvature), -2.0), 2.0)
