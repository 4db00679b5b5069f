"""What stored results say: scores, averages by kind of task, dips from one size to the next."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Result = Mapping[str, Any]
"""A stored model, as `evaluate.sweep` writes it."""

PREFERRED_METRICS = ("acc_norm", "exact_match", "acc", "bits_per_byte", "word_perplexity")
"""A task's metric for tables and plots: the first of these it has, else its first."""

KINDS = {
    "multiple_choice": "classification",
    "loglikelihood": "classification",
    "loglikelihood_rolling": "perplexity",
    "generate_until": "generation",
}
"""lm-eval's output types; averaged apart, since classification hides failures of generation."""

PERPLEXITIES = ("perplexity", "bits_per_byte")
OUT_OF_HUNDRED = ("bleu", "chrf", "ter")
"""Metrics that cannot be averaged with shares of one."""

FAMILY_SERIES = ("family", "random_student")
"""Series whose members should grow better with size."""


@dataclass(frozen=True)
class Score:
    """One metric of one task; `stderr` is None where lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool


def scores_of(result: Result) -> list[Score]:
    """All scores in a stored result, tasks and metrics in lm-eval's order.

    Metrics are named as lm-eval does, with the filter behind where it is not `none`:
    `exact_match,strict-match`."""
    scores = []
    for task, values in result["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            higher = result.get("higher_is_better", {}).get(task, {}).get(metric, True)
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
    """The score of each task that tables and plots show; of a group with a score, its own alone."""
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
    """All tasks and groups below a group; none below a task."""
    for name in result.get("group_subtasks", {}).get(group, []):
        if name != group:
            yield name
            yield from subtasks_of(result, name)


def kind_of(result: Result, score: Score) -> str:
    """Classification, perplexity or generation, by the task's output type and metric."""
    if any(name in score.metric for name in PERPLEXITIES):
        return "perplexity"
    configs = result.get("configs", {})
    for name in (score.task, *subtasks_of(result, score.task)):
        if output_type := configs.get(name, {}).get("output_type"):
            return KINDS[output_type]
    return "classification"


def average_name(result: Result, score: Score) -> str:
    """The average a score goes into: its kind, and its metric where only the same can be
    averaged.
    """
    kind = kind_of(result, score)
    metric = score.metric.partition(",")[0]
    if kind == "perplexity" or not score.higher_is_better or metric in OUT_OF_HUNDRED:
        return f"{kind} ({metric})"
    return kind


def averages(results: Sequence[Result]) -> dict[str, list[Score | None]]:
    """Name of an average to its value for each result, None for one that lacks a task of it.

    Every task counts once. The standard error takes tasks as independent, and is None where one of
    them has none.
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
    """A score that is worse than the next smaller size's."""

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
        """Whether it is deeper than the two scores' combined standard error; None where that is not
        known.
        """
        if self.combined_stderr is None:
            return None
        return abs(self.score.value - self.before.value) > self.combined_stderr


def dips(results: Iterable[Result]) -> list[Dip]:
    """Where a family grows worse with size, on a task's main score."""
    by_family: dict[tuple[Any, str], list[Result]] = {}
    for result in results:
        if result["series"] in FAMILY_SERIES:
            by_family.setdefault((result.get("sweep"), result["series"]), []).append(result)
    found = []
    for members in by_family.values():
        members.sort(key=lambda result: result["num_layers_to_patch"])
        for smaller, result in pairwise(members):
            before = main_scores(smaller)
            for task, score in main_scores(result).items():
                if task not in before:
                    continue
                gain = score.value - before[task].value
                if (gain < 0) if score.higher_is_better else (gain > 0):
                    found.append(Dip(smaller, result, before[task], score))
    return found
