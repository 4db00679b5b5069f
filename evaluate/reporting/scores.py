"""Scores in results, and their averages by kind of task."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
SHARES = ("acc", "exact_match", "pass@")
"""What the names of metrics begin with, or have after an underscore, that are shares of documents:
only these are averaged across metrics. Others have scales of their own."""

FAMILY_SERIES = ("family", "random_student")
"""Series whose members should improve with size."""


@dataclass(frozen=True)
class Score:
    """One metric of one task. `stderr` is None if lm-eval gives none."""

    task: str
    metric: str
    key: str
    """The metric and its filter, as lm-eval writes them."""
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
            if metric == "bypass":  # lm-eval's number where no metric is computed
                continue
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            higher = result.higher_is_better.get(task, {}).get(metric, True)
            scores.append(
                Score(
                    task,
                    metric if filter_name == "none" else key,
                    key,
                    float(value),
                    stderr if isinstance(stderr, float) else None,  # lm-eval writes "N/A"
                    higher is not False,
                )
            )
    return scores


def main_scores(result: Result) -> dict[str, Score]:
    """The score of each task that tables and plots show. A group with a score of its own replaces
    its tasks, except those that were asked for by name.
    """
    by_task: dict[str, list[Score]] = {}
    for score in scores_of(result):
        by_task.setdefault(score.task, []).append(score)
    for group in list(by_task):
        for subtask in subtasks_of(result, group):
            if subtask not in result.tasks:
                by_task.pop(subtask, None)

    def rank(score: Score) -> int:
        base = score.metric.partition(",")[0]
        return (
            PREFERRED_METRICS.index(base) if base in PREFERRED_METRICS else len(PREFERRED_METRICS)
        )

    return {task: min(scores, key=rank) for task, scores in by_task.items()}


def subtasks_of(result: Result, group: str) -> Iterator[str]:
    """All tasks and groups inside a group, each once. A task has none."""
    inside = result.group_subtasks
    seen, waiting = {group}, inside.get(group, [])[::-1]
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            yield name
            waiting += inside.get(name, [])[::-1]


def leaves_of(result: Result, task: str) -> list[str]:
    """The tasks in a group that are no groups themselves; a task is its own."""
    inside = list(subtasks_of(result, task))
    return [name for name in inside if not result.group_subtasks.get(name)] or [task]


def kind_of(result: Result, score: Score) -> str:
    """`classification`, `perplexity` or `generation`, from the task's output type and metric."""
    if any(name in score.metric for name in PERPLEXITIES):
        return "perplexity"
    for name in (score.task, *subtasks_of(result, score.task)):
        if output_type := result.configs.get(name, {}).get("output_type"):
            return KINDS.get(output_type, "classification")
    return "classification"


def average_name(kind: str, scores: Iterable[Score]) -> str:
    """The average that all models' scores on a task belong to: its kind, with its metric if that
    cannot be averaged with others.
    """
    scores = list(scores)
    if kind != "perplexity" and all(map(is_share, scores)):
        return kind
    return f"{kind} ({scores[0].metric.partition(',')[0]})"


def is_share(score: Score) -> bool:
    """Whether a score is a share of documents, from 0 to 1, and the higher the better."""
    metric = score.metric.partition(",")[0]
    named = any(metric.startswith(name) or f"_{name}" in metric for name in SHARES)
    return named and score.higher_is_better and 0 <= score.value <= 1


def tasks_of_averages(results: Sequence[Result]) -> dict[str, list[str]]:
    """By the name of an average, its tasks. Every task counts once: one that is part of a group
    counts with the group.
    """
    by_task: dict[str, list[tuple[Result, Score]]] = {}
    for result in results:
        scores = main_scores(result)
        inside = {task for group in scores for task in subtasks_of(result, group)}
        for task in scores:
            if task not in inside:
                by_task.setdefault(task, []).append((result, scores[task]))
    found: dict[str, list[str]] = {}
    for task, of_models in by_task.items():
        (result, score), *_ = of_models
        name = average_name(kind_of(result, score), (score for _, score in of_models))
        found.setdefault(name, []).append(task)
    return dict(sorted(found.items()))


def averages(results: Sequence[Result]) -> dict[str, list[Score | None]]:
    """By name, an average's value for each result, None for a result that lacks one of its tasks.

    The standard error assumes that tasks are independent. It is None if one of them has none.
    """
    shown = [main_scores(result) for result in results]
    return {
        name: [_average(name, [scores.get(task) for task in tasks]) for scores in shown]
        for name, tasks in tasks_of_averages(results).items()
    }


def _average(name: str, scores: Sequence[Score | None]) -> Score | None:
    if any(score is None for score in scores):
        return None
    errors = [score.stderr for score in scores]
    stderr = None if None in errors else math.hypot(*errors) / len(scores)
    value = sum(score.value for score in scores) / len(scores)
    return Score(name, "mean", "mean", value, stderr, scores[0].higher_is_better)
