"""The report for programs: every score as CSV, and what the tables show as JSON."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.reporting.comparison import Comparison
from evaluate.reporting.conditions import ASKED_FOR, conditions_of
from evaluate.reporting.scores import averages, scores_of
from evaluate.result import Result


def csv_table(results: Sequence[Result]) -> str:
    """One line per model, task and metric."""
    rows = []
    for result in results:
        for score in scores_of(result):
            conditions = conditions_of(result, score.task)
            rows.append(
                {
                    "sweep": result.sweep or "",
                    "series": result.series,
                    "model": result.label,
                    "num_layers_to_patch": result.num_layers_to_patch,
                    "depth": result.depth,
                    "parameters_both_counted": result.parameters.both_counted,
                    "parameters_stored": result.parameters.stored,
                    "task": score.task,
                    "metric": score.metric,
                    "value": score.value,
                    "stderr": "" if score.stderr is None else score.stderr,
                    "is_verified": not result.is_unverified(score.task),
                    **{
                        name.replace(" ", "_"): value
                        for name, value in conditions.items()
                        if name != ASKED_FOR
                    },
                }
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_summary(comparison: Comparison, failures: Mapping[str, str]) -> dict[str, Any]:
    """What the tables show."""
    columns = averages(comparison.results)
    models = []
    for i, result in enumerate(comparison.results):
        shown = comparison.shown[i]
        models.append(
            {
                "sweep": result.sweep,
                "model": result.label,
                "series": result.series,
                "num_layers_to_patch": result.num_layers_to_patch,
                "depth": result.depth,
                "parameters": vars(result.parameters),
                "similarity": result.similarity and vars(result.similarity),
                "cost": result.cost and vars(result.cost),
                "scores": {task: vars(score) for task, score in shown.items()},
                "conditions": {
                    task: {"is_verified": not result.is_unverified(task)}
                    | dict(comparison.conditions[i][task])
                    for task in shown
                },
                "averages": {
                    name: vars(scores[i]) for name, scores in columns.items() if scores[i]
                },
            }
        )
    found = [
        {
            "sweep": dip.result.sweep,
            "series": dip.result.series,
            "model": dip.result.label,
            "num_layers_to_patch": dip.result.num_layers_to_patch,
            "task": dip.score.task,
            "value": dip.score.value,
            "at_next_smaller_size": dip.before.value,
            "difference": dip.difference.value,
            "stderr_of_difference": dip.difference.stderr,
            "is_paired": dip.difference.is_paired,
            "p": dip.difference.p,
            "corrected_p": dip.corrected_p,
            "is_significant": dip.is_significant,
        }
        for dip in comparison.dips
    ]
    return {"models": models, "dips": found, "failures": dict(failures)}
