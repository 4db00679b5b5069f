"""The loop over series, tasks and members. It computes what is not stored yet."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from evaluate.cost import cost_of
from evaluate.harness import Harness, first_prompts
from evaluate.ranks import Ranks
from evaluate.result import FinishedTask, Result, Similarity
from evaluate.series import MemberLM, Series, SeriesMember, sources_of
from evaluate.shards import WHOLE, Shard
from evaluate.sources import versions
from evaluate.stored import Store, missing_tasks, what_changed
from evaluate.tasks import Tasks, names_in, overlapping, reason, union
from patching.running.calibration import Calibration
from patching.running.similarity import last_states, mean_cosine

logger = logging.getLogger(__name__)

Missing = dict[tuple[str, ...], list[SeriesMember]]
"""By tasks that run together, the members without current scores on one of them."""


@dataclass
class Sweep:
    """Only the first rank has tasks, and reads and writes the folder."""

    harness: Harness
    tasks: Tasks
    text: Calibration | None
    """The text on which members are compared with their teacher."""
    store: Store
    ranks: Ranks
    failures: dict[str, str] = field(default_factory=dict)
    """Tasks that could not be evaluated, and why."""
    shard: Shard = WHOLE
    parts: set[tuple[tuple[str, ...], str]] = field(default_factory=set)
    """Tasks that run together and the name of a member, for all that belongs to this shard."""
    write_out: bool = False
    """Whether to show the first prompt of each task."""
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    """By task, what its scores come from, as far as that is the same for all series."""

    def run(self, all_series: Sequence[Series]) -> None:
        """Compute and store whatever is not in the folder."""
        missing: list[Missing] = [{} for _ in all_series]
        if self.ranks.is_first:
            self.parts, tasks = parts_of(self.tasks, all_series, self.shard)
            if self.tasks and not self.parts:
                logger.warning("shard %d/%d: there are fewer scores than shards", *self.shard)
            self.tasks = tasks
            self._read_tasks()
        if not self.ranks.from_first(bool(self.tasks)):
            return
        if self.ranks.is_first:
            self.store.read()
            missing = [self._missing(series) for series in all_series]
            for line in what_changed(
                (self.store.results[member.name], self._wanted(series, self.tasks))
                for series in all_series
                for member in series.members
                if member.name in self.store.results
            ):
                logger.warning(line)
        num_scores = sum(len(members) for of_series in missing for members in of_series.values())
        # No smoothing: a task's first member computes scores for all, so its time is no estimate.
        with tqdm(
            total=num_scores,
            desc="sweep",
            unit="score",
            smoothing=0,
            disable=not self.ranks.is_first,
        ) as progress:
            for series, of_series in zip(all_series, missing):
                self._run_series(series, of_series, progress)

    def _run_series(self, series: Series, missing: Missing, progress: tqdm) -> None:
        unmeasured = [m for m in series.members if self._is_unmeasured(m)]
        needed = {m.name for members in missing.values() for m in members}
        needed = self.ranks.from_first(needed | {m.name for m in unmeasured})
        if not needed:
            return
        lm = self.ranks.together(
            lambda: series.load([m for m in series.members if m.name in needed])
        )
        if self.ranks.is_first:
            for member, measured in measure(series, lm, unmeasured, self.text):
                self.store.update(
                    series, member, lambda result, new=measured: replace(result, **new)
                )
            for names, members in missing.items():
                self._run_tasks(series, lm, names, members, progress)
            self.ranks.release()
        else:
            self.ranks.answer(lm)
        del lm  # before the next series loads
        series.release()

    def _read_tasks(self) -> None:
        """Find out what tasks ask. Those that cannot say are failures."""
        of_libraries = versions()
        for task, loaded in list(self.tasks.items()):
            try:
                self.sources[task] = self.harness.sources(loaded) | of_libraries
                if self.write_out:
                    logger.warning("\n".join(first_prompts(loaded)))
            except Exception as error:  # tasks are code
                logger.error("%s: its prompts cannot be built", task, exc_info=True)
                self.failures[task] = reason(error)
                self.tasks = {name: of for name, of in self.tasks.items() if name != task}

    def _wanted(self, series: Series, names: Iterable[str]) -> dict[str, dict[str, str]]:
        return {name: self.sources[name] | sources_of(series, self.tasks[name]) for name in names}

    def _missing(self, series: Series) -> Missing:
        found = {}
        for names in overlapping(self.tasks):
            members = [
                m
                for m in series.members
                if (tuple(names), m.name) in self.parts and self._missing_of(series, m, names)
            ]
            if members:
                found[tuple(names)] = members
        return found

    def _missing_of(self, series: Series, member: SeriesMember, names: Sequence[str]) -> list[str]:
        stored, wanted = self.store.results.get(member.name), self._wanted(series, names)
        return missing_tasks(stored, wanted, self.harness.log_samples)

    def _is_unmeasured(self, member: SeriesMember) -> bool:
        if not self.ranks.is_first or not any(name == member.name for _, name in self.parts):
            return False
        return is_unmeasured(self.store.results.get(member.name), self.text)

    def _run_tasks(
        self,
        series: Series,
        lm: MemberLM,
        names: Sequence[str],
        members: Sequence[SeriesMember],
        progress: tqdm,
    ) -> None:
        """Score members on tasks that run together. If one fails, note it and skip the rest."""
        self.store.read(members)  # another sweep may have been here
        members = [m for m in members if self._missing_of(series, m, names)]
        for num_done, member in enumerate(members):
            progress.set_postfix_str(f"{', '.join(names)} {member.name}")
            start = time.perf_counter()
            lm.activate(member.name)
            missing = self._missing_of(series, member, names)
            try:
                found = self.harness.score(lm, union([self.tasks[name] for name in missing]))
                found["generation_failures"] = lm.take_failures()
            except Exception as error:  # tasks are code
                for name in missing:
                    logger.error("%s failed on %s", name, member.name, exc_info=True)
                    self.failures[name] = reason(error)
                progress.update(len(members) - num_done)
                break
            seconds = time.perf_counter() - start
            finished = {
                name: FinishedTask(
                    seconds, self.harness.log_samples, sources, names_in(self.tasks[name])
                )
                for name, sources in self._wanted(series, missing).items()
            }
            self.store.add_scores(series, member, finished, found)
            progress.update()
        lm.forget()


def parts_of(
    tasks: Tasks, all_series: Sequence[Series], shard: Shard
) -> tuple[set[tuple[tuple[str, ...], str]], Tasks]:
    """What belongs to a shard: tasks that run together with the name of a member, and these tasks
    alone.
    """
    parts = [
        (tuple(names), member.name)
        for names in overlapping(tasks)
        for series in all_series
        for member in series.members
    ]
    chosen = set(shard.of(parts))
    names = {name for names, _ in chosen for name in names}
    return chosen, {name: loaded for name, loaded in tasks.items() if name in names}


def is_unmeasured(result: Result | None, text: Calibration | None) -> bool:
    """Whether a model's cost or its similarity on this text is not in its result."""
    if result is None or result.cost is None:
        return True
    if result.similarity is None or text is None:
        return False
    return result.similarity.sha256 != text.sha256


def measure(
    series: Series, lm: MemberLM, members: Sequence[SeriesMember], text: Calibration | None
) -> Iterator[tuple[SeriesMember, dict[str, Any]]]:
    """What a model costs, and how similar it is to its teacher on a text, as fields of results."""
    teacher = series.teacher if members else None
    if teacher is not None and text is not None:
        batches = text.batches(lm.tokenizer, teacher.config)
        teacher_states = last_states(teacher, batches)
    for member in tqdm(members, desc="measuring", unit="model", leave=False):
        lm.activate(member.name)
        measured: dict[str, Any] = {"cost": cost_of(lm.model)}
        if teacher is not None and text is not None:
            cosine = mean_cosine(last_states(lm.model, batches), teacher_states, batches)
            measured["similarity"] = Similarity(cosine, text.name, text.sha256)
        yield member, measured
