"""How far each size is ahead of the teacher pruned to its depth, and of the next smaller size.

All models answer the same documents, so the differences are paired (`evaluate.reporting.paired`)
and far more certain than the scores are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluate.report import read_sweeps
from evaluate.reporting.paired import difference
from evaluate.reporting.scores import main_scores
from evaluate.result import Result
from patching.files.outputs import write_text

NORMAL_95 = 1.96
"""Standard errors on each side of a 95 % interval."""
OTHERS = {
    "naive": "naively pruned",
    "block_influence": "pruned by block influence",
    "smaller": "next smaller size",
    "reference": "the same size in `{}`",
}
"""What a size is compared with, by series or by what it is."""


class Lead(NamedTuple):
    """How much better one model is than another, positive if it is ahead."""

    value: float
    interval: float | None
    """Half the width of the 95 % interval. None if it is not known."""

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:+.4f}"
        return f"{self.value:+.4f} ± {self.interval:.4f}"

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and abs(self.value) > self.interval


Leads = dict[str, dict[int, dict[str, Lead]]]
"""By task, size k and name of the other model."""


def write_differences(
    folders: Sequence[Path], path: Path, references: Mapping[str, str] | None = None
) -> None:
    """Write the tables of some sweeps of one pair to a Markdown file. Only the first sweep needs
    baselines: they do not depend on the order. `references` names, for some sweeps, another one
    whose sizes theirs are compared with too.
    """
    references = references or {}
    results = {folder.name: _by_name(folder) for folder in folders}
    baselines = {
        name: result for name, result in results[folders[0].name].items() if result.series in OTHERS
    }
    parts = ["# Each size against others of its depth, and against the next smaller size", CAPTION]
    for order, members in results.items():
        reference = references.get(order)
        others = {
            f"reference_k{result.num_layers_to_patch}": result
            for result in results.get(reference, {}).values()
            if result.series == "family"
        }
        leads = leads_of(members | baselines | others)
        labels = {
            name: label.format(reference)
            for name, label in OTHERS.items()
            if any(name in of_size for of_task in leads.values() for of_size in of_task.values())
        }
        parts += [f"## Order `{order}`", _summary(leads, labels)]
        for task, of_task in leads.items():
            parts += [f"### {task}", _table(members, task, of_task, labels)]
    write_text(path, "\n\n".join(parts) + "\n")
    print(f"differences: {path}")


CAPTION = (
    "Positive numbers say that the size is better, whichever direction is better for the task. "
    "Intervals are 95 % (1.96 standard errors of the paired differences)."
)


def leads_of(results: dict[str, Result]) -> Leads:
    """Compare each size between student and teacher, the student included, with the others."""
    found: Leads = {}
    max_k = results["family_k0"].max_layers_to_patch
    for k in range(max_k + 1):
        member = results[f"family_k{k}"]
        others = {name: results.get(f"{name}_k{k}") for name in OTHERS}
        others["smaller"] = results.get(f"family_k{k - 1}")
        for task, score in main_scores(member).items():
            for name, other in others.items():
                if other is None or task not in (scores := main_scores(other)):
                    continue
                found_difference = difference(other, member, scores[task], score)
                sign, stderr = 1 if score.higher_is_better else -1, found_difference.stderr
                lead = Lead(
                    sign * found_difference.value,
                    None if stderr is None else NORMAL_95 * stderr,
                )
                found.setdefault(task, {}).setdefault(k, {})[name] = lead
    return found


def _by_name(folder: Path) -> dict[str, Result]:
    results = read_sweeps([folder]).results
    return {f"{result.series}_k{result.num_layers_to_patch}": result for result in results}


def _summary(leads: Leads, labels: Mapping[str, str]) -> str:
    """At how many sizes the family is ahead and behind, by task and by what it is compared with."""
    header = ["task", *(f"ahead of {label}" for label in labels.values())]
    rows = [header, ["---", *["---:"] * len(labels)]]
    for task, of_task in leads.items():
        cells = []
        for name in labels:
            of_name = [of_size[name] for of_size in of_task.values() if name in of_size]
            ahead = sum(lead.value > 0 for lead in of_name)
            surely_ahead = sum(lead.value > 0 and lead.is_certain for lead in of_name)
            surely_behind = sum(lead.value < 0 and lead.is_certain for lead in of_name)
            cells.append(
                f"{ahead} of {len(of_name)} ({surely_ahead} certain; {surely_behind} certainly "
                "behind)"
            )
        rows.append([task, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _table(
    members: Mapping[str, Result],
    task: str,
    of_task: Mapping[int, Mapping[str, Lead]],
    labels: Mapping[str, str],
) -> str:
    header = ["model", "layers", "score", *(f"ahead of {label}" for label in labels.values())]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for k, leads in of_task.items():
        member = members[f"family_k{k}"]
        score = main_scores(member)[task]
        cells = [str(leads[name]) if name in leads else "" for name in labels]
        rows.append([member.label, str(member.depth), f"{score.value:.4f}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
