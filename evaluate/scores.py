"""Scores in results, their averages by kind of task, and dips from one size to the next."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evaluate.result import Result

PREFERRED_METRICS = ("acc_norm", "exact_match", "acc", "bits_per_byte", "word_perplexity")
"""The metric that tables and plots show: the first of these that a task has, else its first one."""

KINDS = {
    "multiple_choice": "classification",
    "loglikelihood": "classification",
    "loglikelihood_rolling": "perplexity",
    "generate_until": "generation",
}
"""Kinds of tasks by lm-eval's output types. They are averaged separately because a good average in
classification hides failures of generation."""

PERPLEXITIES = ("perplexity", "bits_per_byte")
OUT_OF_HUNDRED = ("bleu", "chrf", "ter")
"""Metrics from 0 to 100, which cannot be averaged with metrics from 0 to 1."""

FAMILY_SERIES = ("family", "random_student")
"""Series whose members should improve with size."""


@dataclass(frozen=True)
class Score:
    """One metric of one task. `stderr` is None if lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool


def scores_of(result: Result) -> list[Score]:
    """All scores of a result, with tasks and metrics in lm-eval's order.

    Metrics have lm-eval's names, followed by their filter if there is one:
    `exact_match,strict-match`.
    """
    scores = []
    for task, values in result.results.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            higher = result.higher_is_better.get(task, {}).get(metric, True)
            scores.append(
                Score(
                    task,
                    metric if filter_name == "none" else key,
                    float(value),
                    stderr if isinstance(stderr, float) else None,  # lm-eval writes "N/A"
                    higher is not False,
                )
            )
    return scores


def main_scores(result: Result) -> dict[str, Score]:
    """The score of each task that tables and plots show. A group with a score of its own replaces
    its tasks.
    """
    by_task: dict[str, list[Score]] = {}
    for score in scores_of(result):
        by_task.setdefault(score.task, []).append(score)
    for group in list(by_task):
        for subtask in subtasks_of(result, group):
            by_task.pop(subtask, None)

    def rank(score: Score) -> int:
        base = score.metric.partition(",")[0]
        return (
            PREFERRED_METRICS.index(base) if base in PREFERRED_METRICS else len(PREFERRED_METRICS)
        )

    return {task: min(scores, key=rank) for task, scores in by_task.items()}


def subtasks_of(result: Result, group: str) -> Iterator[str]:
    """All tasks and groups inside a group. A task has none."""
    for name in result.group_subtasks.get(group, []):
        if name != group:
            yield name
            yield from subtasks_of(result, name)


def kind_of(result: Result, score: Score) -> str:
    """`classification`, `perplexity` or `generation`, from the task's output type and metric."""
    if any(name in score.metric for name in PERPLEXITIES):
        return "perplexity"
    for name in (score.task, *subtasks_of(result, score.task)):
        if output_type := result.configs.get(name, {}).get("output_type"):
            return KINDS[output_type]
    return "classification"


def average_name(result: Result, score: Score) -> str:
    """The average that a score belongs to: its kind, with its metric if that cannot be averaged
    with others.
    """
    kind = kind_of(result, score)
    metric = score.metric.partition(",")[0]
    if kind == "perplexity" or not score.higher_is_better or metric in OUT_OF_HUNDRED:
        return f"{kind} ({metric})"
    return kind


def averages(results: Sequence[Result]) -> dict[str, list[Score | None]]:
    """By name, an average's value for each result, None for a result that lacks one of its tasks.

    Every task counts once. The standard error assumes that tasks are independent. It is None if
    one of them has none.
    """
    tasks: dict[str, list[str]] = {}
    for result in results:
        for task, score in main_scores(result).items():
            of_average = tasks.setdefault(average_name(result, score), [])
            if task not in of_average:
                of_average.append(task)
    return {
        name: [_average(name, [main_scores(result).get(task) for task in of_average])
               for result in results]
        for name, of_average in sorted(tasks.items())
    }  # fmt: skip


def _average(name: str, scores: Sequence[Score | None]) -> Score | None:
    if any(score is None for score in scores):
        return None
    errors = [score.stderr for score in scores]
    stderr = None if None in errors else math.hypot(*errors) / len(scores)
    value = sum(score.value for score in scores) / len(scores)
    return Score(name, "mean", value, stderr, scores[0].higher_is_better)


@dataclass(frozen=True)
class Dip:
    """A score that is worse than that of the next smaller size."""

    smaller: Result
    result: Result
    before: Score
    score: Score

    @property
    def combined_stderr(self) -> float | None:
        if self.before.stderr is None or self.score.stderr is None:
            return None
        return math.hypot(self.before.stderr, self.score.stderr)

    @property
    def is_significant(self) -> bool | None:
        """Whether it is larger than the two scores' combined standard error. None if that is not
        known.
        """
        if self.combined_stderr is None:
            return None
        return abs(self.score.value - self.before.value) > self.combined_stderr


def dips(results: Iterable[Result]) -> list[Dip]:
    """Where a family's score on a task gets worse with size."""
    by_series: dict[tuple[str | None, str], list[Result]] = {}
    for result in results:
        if result.series in FAMILY_SERIES:
            by_series.setdefault((result.sweep, result.series), []).append(result)
    found = []
    for members in by_series.values():
        members.sort(key=lambda result: result.num_layers_to_patch)
        for smaller, result in pairwise(members):
            before = main_scores(smaller)
            for task, score in main_scores(result).items():
                if task not in before:
                    continue
                gain = score.value - before[task].value
                if (gain < 0) if score.higher_is_better else (gain > 0):
                    found.append(Dip(smaller, result, before[task], score))
    return found
