"""Results side by side: the scores to show, what they come from, and what to note at them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evaluate.reporting.conditions import Conditions, conditions_of, differences, usual
from evaluate.reporting.dips import Dip, dips
from evaluate.reporting.scores import Score, main_scores
from evaluate.result import Result

DIP_MARKS = {True: " ▼", False: " ▽", None: " ▼"}
"""By whether a dip is significant. One that cannot be tested counts as significant."""
UNVERIFIED, OTHER_CONDITIONS = " ‡", " †"


class Comparison(NamedTuple):
    """What tables and plots are made of, computed once for all of them."""

    results: Sequence[Result]
    """In the order of their rows and columns."""
    shown: list[dict[str, Score]]
    """Each result's score on each task."""
    conditions: list[dict[str, Conditions]]
    """Those of each of these scores."""
    usual: dict[str, Conditions]
    """By task, the most frequent conditions."""
    dips: list[Dip]

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Comparison":
        shown = [main_scores(result) for result in results]
        conditions = [
            {task: conditions_of(result, task) for task in scores}
            for result, scores in zip(results, shown)
        ]
        by_task: dict[str, list[Conditions]] = {}
        for of_model in conditions:
            for task, of_score in of_model.items():
                by_task.setdefault(task, []).append(of_score)
        usual_of_task = {task: usual(of_models) for task, of_models in by_task.items()}
        return cls(results, shown, conditions, usual_of_task, dips(results))

    def other_conditions(self, i: int, task: str) -> str:
        """How those of a score differ from the usual ones of its task, in words."""
        return differences(self.conditions[i][task], self.usual[task])

    def mark(self, i: int, task: str) -> str:
        """What to note at a score that may not be comparable with the others of its task."""
        unverified = UNVERIFIED if self.results[i].is_unverified(task) else ""
        return unverified + (OTHER_CONDITIONS if self.other_conditions(i, task) else "")

    def dip_mark(self, i: int, task: str) -> str:
        """What to note at a score that is worse than that of the next smaller size."""
        found = (d for d in self.dips if d.result is self.results[i] and d.score.task == task)
        return "".join(DIP_MARKS[dip.is_significant] for dip in found)

    def marks_of(self, tasks: Iterable[str], i: int | None = None) -> str:
        """All marks of some tasks' scores, of one result or of all."""
        of_results = range(len(self.results)) if i is None else [i]
        marks = [self.mark(j, task) for task in tasks for j in of_results if task in self.shown[j]]
        return "".join(m for m in (UNVERIFIED, OTHER_CONDITIONS) if any(m in of for of in marks))
