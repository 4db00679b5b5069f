"""A sweep's folder: what is stored in it, and what of that can be used again, which are scores that
come from the same sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluate.documents import FOLDER as DOCUMENTS
from evaluate.documents import add_documents, documents_of, read_documents
from evaluate.failures import FILE_NAME as FAILURES
from evaluate.harness import SAMPLES, as_json, write_samples
from evaluate.lm_eval_files import FOLDER as LM_EVAL
from evaluate.report import FILE_NAMES as REPORT_FILES
from evaluate.result import (
    LM_EVAL_KEYS,
    FinishedTask,
    Result,
    Run,
    read_results,
    update_result,
)
from patching.files.outputs import check_writable

if TYPE_CHECKING:
    from evaluate.series import Series, SeriesMember

Sources = Mapping[str, Mapping[str, str]]
"""By task, what its scores come from."""


@dataclass
class Store:
    folder: Path
    runs: Mapping[str, Run]
    """By series, the run that new scores come from."""
    results: dict[str, Result] = field(default_factory=dict)
    """By member, what is stored, as far as it has been read."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By member, fields of its result that are known before it runs."""
    changed: set[str] = field(default_factory=set)
    """Members with new scores."""

    def read(self, members: Iterable[SeriesMember] | None = None) -> None:
        """Read what is stored by now of all members, or of some."""
        if members is None:
            self.results = read_results(self.folder)
            return
        names = [member.name for member in members]
        kept = {name: result for name, result in self.results.items() if name not in names}
        self.results = kept | read_results(self.folder, names)

    def update(
        self, series: Series, member: SeriesMember, change: Callable[[Result], Result]
    ) -> None:
        """Change what is stored of a member by now."""
        if member.name not in self.facts:
            self.facts[member.name] = series.facts(member)
        facts = self.facts[member.name]
        self.results[member.name] = update_result(
            self.folder, member.name, lambda stored: change(with_facts(stored, facts))
        )

    def add_scores(
        self,
        series: Series,
        member: SeriesMember,
        finished: Mapping[str, FinishedTask],
        found: Mapping[str, Any],
    ) -> None:
        """Store what lm-eval found on tasks that ran together."""
        if any(task.has_samples for task in finished.values()):
            write_samples(self.folder / SAMPLES / member.name, found["samples"])
        values = as_json({key: found.get(key) for key in LM_EVAL_KEYS.values()})
        documents = documents_of(found["samples"])

        def add(result: Result) -> Result:
            add_documents(self.folder, member.name, documents)  # before the scores they belong to
            result.add_scores(finished, self.runs[member.series], values)
            return result

        self.update(series, member, add)
        self.changed.add(member.name)


def check_folder(folder: Path) -> None:
    """Raise ValueError if results cannot be stored in a folder: where a folder has the name of a
    file, or a file that of a folder, or scores of documents are damaged.
    """
    check_writable(folder, FAILURES, *REPORT_FILES)
    for name in (DOCUMENTS, SAMPLES, LM_EVAL):
        check_writable(folder / name)
    for path in folder.glob(f"{DOCUMENTS}/*.npz"):
        read_documents(folder, path.stem)


def missing_tasks(stored: Result | None, wanted: Sources, with_samples: bool = False) -> list[str]:
    """The tasks without scores from the wanted sources, or without samples where these are asked
    for.
    """
    tasks = stored.tasks if stored else {}
    return [
        name
        for name, sources in wanted.items()
        if name not in tasks
        or tasks[name].sources != sources
        or (with_samples and not tasks[name].has_samples)
    ]


def what_changed(results: Iterable[tuple[Result, Sources]]) -> Iterator[str]:
    """A line for each task with stored scores that come from something else than is wanted."""
    counts: dict[tuple[str, str], int] = {}
    for result, wanted in results:
        for name in wanted.keys() & result.tasks.keys():
            if why := difference(result.tasks[name], wanted[name]):
                counts[name, why] = counts.get((name, why), 0) + 1
    for (name, why), count in sorted(counts.items()):
        yield f"{name}: {count} stored scores are computed again because of {why}"


def difference(stored: FinishedTask, wanted: Mapping[str, str]) -> str:
    """What a stored score came from that is another now, in words."""
    if stored.sources is None:
        return "an earlier version, which did not store what they came from"
    changed = []
    for name in sorted(stored.sources.keys() | wanted.keys()):
        before, now = stored.sources.get(name), wanted.get(name)
        if before != now:
            changed.append(f"{name}: {before}, now {now}")
    return "; ".join(changed)


def with_facts(stored: Result | None, facts: Mapping[str, Any]) -> Result:
    """A stored result with what is known of its model now. Scores that an earlier version stored
    for another recipe are dropped.
    """
    new = Result(**facts)
    if stored is None:
        return new
    is_other = as_json(stored.recipe) != as_json(new.recipe)
    if is_other and all(map(stored.is_unverified, stored.tasks)):
        return new
    for name in facts:
        setattr(stored, name, getattr(new, name))
    return stored
