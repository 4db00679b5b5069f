"""The difference between two models' scores on a task, from their scores on each document.

All sizes of a family answer the same documents, and mostly alike, so the difference is far more
certain than either score. Its standard error is that of the mean of the documents' differences.
A score that is no mean, such as a perplexity, is made one by linearization (Cochran, Sampling
Techniques, 3rd edition, 2.11): each document is given the score plus its influence on it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from evaluate.reporting.scores import Score, leaves_of
from evaluate.result import Result

Values = NDArray[numpy.float64]
SAME = {"rel_tol": 1e-5, "abs_tol": 1e-9}
"""How close documents must come to the stored score to be taken for its own."""
EXACT_UP_TO = 10_000
"""Documents that differ, above which the exact test is that of a normal distribution anyway."""


class Difference(NamedTuple):
    value: float
    """The second score minus the first."""
    stderr: float | None
    """None if it is not known."""
    p: float | None
    """How likely a difference this bad or worse would be if the second model were as good as the
    first, by a one-sided test. None if that is not known."""
    is_paired: bool
    """Whether single documents were compared. If not, the two scores are taken to be independent,
    which overstates the error."""


def difference(first: Result, second: Result, before: Score, score: Score) -> Difference:
    """The difference between the same score of two models.

    The test is McNemar's exact one where documents are right or wrong and all weigh alike, else a
    paired t-test.
    """
    value = score.value - before.value
    sign = 1 if score.higher_is_better else -1
    if not math.isfinite(value):
        return Difference(value, None, None, False)
    parts = _paired_parts(first, second, before, score)
    if parts is None:
        if before.stderr is None or score.stderr is None:
            return Difference(value, None, None, False)
        stderr = math.hypot(before.stderr, score.stderr)
        if not math.isfinite(stderr):
            return Difference(value, None, None, False)
        return Difference(value, stderr, _normal_p(sign * value, stderr), False)
    of_documents = numpy.concatenate([differences for _, differences in parts])
    if len(of_documents) < 2:
        return Difference(value, None, None, True)
    variance = sum(
        weight**2 * differences.var(ddof=1) / len(differences)
        for weight, differences in parts
        if len(differences) > 1
    )
    stderr = math.sqrt(variance)
    if not math.isfinite(stderr):
        return Difference(value, None, None, True)
    size = len(of_documents)
    weigh_alike = all(math.isclose(weight, len(of_task) / size) for weight, of_task in parts)
    if weigh_alike and set(numpy.unique(of_documents)) <= {-1.0, 0.0, 1.0}:
        p = _sign_test_p(sign * of_documents)
    elif stderr == 0:
        p = 0.5**size if sign * value < 0 else 1.0
    else:
        p = _t_p(sign * value / stderr, size - len(parts))
    return Difference(value, stderr, p, True)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the chance of even one false alarm among all of them
    stays below the level each is compared with (Holm 1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _paired_parts(
    first: Result, second: Result, before: Score, score: Score
) -> list[tuple[float, Values]] | None:
    """The documents' differences, by the tasks that a score is made of, with the weight of each
    task. None if these are not known, or not those of the same documents.
    """
    asked = [result.finished(score.task) for result in (first, second)]
    for name in ("documents", "prompts"):
        hashes = {task.sources.get(name) if task and task.sources else None for task in asked}
        if len(hashes) > 1 or None in hashes:
            return None
    tasks = leaves_of(second, score.task)
    values = []
    for result, of_result in ((first, before), (second, score)):
        found = [_values_of(result, task, of_result.key) for task in tasks]
        if any(of_task is None for of_task in found):
            return None
        values.append(found)
    sizes = [len(of_task) for of_task in values[0]]
    if sizes != [len(of_task) for of_task in values[1]]:
        return None
    weights = _weights(before.value, values[0], sizes)
    if weights is None:
        return None
    return [(weight, b - a) for weight, a, b in zip(weights, *values)]


def _values_of(result: Result, task: str, key: str) -> Values | None:
    """Each document's score, whose mean is the task's score. None if what is kept of the documents
    does not come to that.
    """
    kept, score = result.documents.get(f"{task}/{key}"), result.results.get(task, {}).get(key)
    if kept is None or score is None or not len(kept):
        return None
    if kept.ndim == 1:
        mean = kept.mean()
        if math.isclose(mean, score, **SAME):
            return kept
        if mean > -700 and math.isclose(math.exp(-mean), score, **SAME):  # a perplexity
            return score - score * (kept - mean)
        return None
    total, weight = kept.sum(0)
    if not weight:
        return None
    mean = total / weight
    influences = (kept[:, 0] - mean * kept[:, 1]) * len(kept) / weight
    if math.isclose(-mean / math.log(2), score, **SAME):  # bits
        return score - influences / math.log(2)
    if mean > -700 and math.isclose(math.exp(-mean), score, **SAME):
        return score - score * influences
    return None


def _weights(score: float, values: Sequence[Values], sizes: Sequence[int]) -> list[float] | None:
    """The weights with which a group's score is the mean of its tasks' scores: by their numbers of
    documents, or all alike. None if it is neither.
    """
    means = [of_task.mean() for of_task in values]
    by_size = [size / sum(sizes) for size in sizes]
    for weights in (by_size, [1 / len(sizes)] * len(sizes)):
        if math.isclose(sum(w * mean for w, mean in zip(weights, means)), score, **SAME):
            return weights
    return None


def _sign_test_p(gains: Values) -> float:
    """The chance that of the documents that differ as few or fewer gain, if each may do either."""
    num_gains, num_losses = int((gains > 0).sum()), int((gains < 0).sum())
    count = num_gains + num_losses
    if count > EXACT_UP_TO:
        return _normal_p(num_gains + 0.5 - count / 2, math.sqrt(count) / 2)
    return sum(math.comb(count, i) for i in range(num_gains + 1)) / 2**count


def _normal_p(gain: float, stderr: float) -> float:
    if stderr == 0:
        return 0.0 if gain < 0 else 1.0
    return math.erfc(-gain / stderr / math.sqrt(2)) / 2


def _t_p(t: float, degrees_of_freedom: int) -> float:
    from scipy.stats import t as student_t  # a second, and `--help` does not need it

    return float(student_t.cdf(t, max(1, degrees_of_freedom)))
