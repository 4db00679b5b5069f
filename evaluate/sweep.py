"""The loop over series, tasks and members. It computes what is not stored yet."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluate.cost import cost_of
from evaluate.harness import Harness, as_json, write_samples
from evaluate.result import (
    LM_EVAL_KEYS,
    FinishedTask,
    Result,
    Similarity,
    read_results,
    write_result,
)
from evaluate.series import MemberLM, Series, SeriesMember
from evaluate.tasks import Tasks, reason
from patching.running.calibration import Calibration
from patching.running.similarity import last_states, mean_cosine

logger = logging.getLogger(__name__)


@dataclass
class Sweep:
    folder: Path
    harness: Harness
    tasks: Tasks
    text: Calibration | None
    """The text on which members are compared with their teacher."""
    made_by: Mapping[str, Any]
    """Arguments and environment, written into every result."""
    is_writer: bool = True
    """Whether this rank measures and writes."""
    failures: dict[str, str] = field(default_factory=dict)
    """Tasks that could not be evaluated, and why."""
    results: dict[str, Result] = field(default_factory=dict)
    """By member, what is stored in the folder."""

    def run(self, all_series: Sequence[Series]) -> None:
        """Compute and store whatever is not in the folder."""
        self.results = read_results(self.folder)
        missing = [self._missing(series) for series in all_series]
        num_scores = sum(len(members) for of_series in missing for members in of_series.values())
        # No smoothing: a task's first member computes scores for all, so its time is no estimate.
        with tqdm(
            total=num_scores, desc="sweep", unit="score", smoothing=0, disable=not self.is_writer
        ) as progress:
            for series, of_series in zip(all_series, missing):
                unmeasured = [m for m in series.members if self._is_unmeasured(m)]
                needed = {*unmeasured, *(m for members in of_series.values() for m in members)}
                if not needed:
                    continue
                lm = series.load([m for m in series.members if m in needed])
                if self.is_writer:
                    self._measure(series, lm, unmeasured)
                for task, members in of_series.items():
                    self._run_task(lm, task, members, progress)
                del lm  # before the next series loads
                series.release()

    def _missing(self, series: Series) -> dict[str, list[SeriesMember]]:
        """By task, the members without scores on it. Tasks that all members have are left out."""

        def is_missing(member: SeriesMember, task: str) -> bool:
            result = self.results.get(member.name)
            finished = result and result.tasks.get(task)
            return not finished or (self.harness.log_samples and not finished.has_samples)

        missing = {task: [m for m in series.members if is_missing(m, task)] for task in self.tasks}
        return {task: members for task, members in missing.items() if members}

    def _is_unmeasured(self, member: SeriesMember) -> bool:
        """Whether a member's cost or its similarity on this text is not stored."""
        result = self.results.get(member.name)
        if result is None:
            return True
        if result.similarity is None or self.text is None:
            return False
        return result.similarity.sha256 != self.text.sha256

    def _measure(self, series: Series, lm: MemberLM, members: Sequence[SeriesMember]) -> None:
        """Store everything about members but their scores."""
        if not members:
            return
        teacher, text = series.teacher, self.text
        if teacher is not None and text is not None:
            batches = text.batches(lm.tokenizer, teacher.config)
            teacher_states = last_states(teacher, batches)
        for member in tqdm(members, desc="measuring", unit="model", leave=False):
            lm.activate(member.name)
            measured = series.facts(member) | {"cost": cost_of(lm.model)}
            if teacher is not None and text is not None:
                cosine = mean_cosine(last_states(lm.model, batches), teacher_states, batches)
                measured["similarity"] = Similarity(cosine, text.name, text.sha256)
            known = self.results.get(member.name)
            result = Result(**measured) if known is None else replace(known, **measured)
            self._store(member, result)

    def _run_task(
        self, lm: MemberLM, task: str, members: Sequence[SeriesMember], progress: tqdm
    ) -> None:
        """Score members on one task. If one fails, note it and skip the rest of the task."""
        for num_done, member in enumerate(members):
            progress.set_postfix_str(f"{task} {member.name}")
            start = time.perf_counter()
            lm.activate(member.name)
            try:
                found = self.harness.score(lm, self.tasks[task])
            except Exception as error:
                if lm.world_size > 1:  # the other ranks wait for this one and cannot be told
                    error.add_note(f"while evaluating {member.name} on {task}")
                    raise
                logger.error("%s failed on %s", task, member.name, exc_info=True)
                self.failures[task] = reason(error)
                progress.update(len(members) - num_done)
                break
            if found is not None:
                if self.harness.log_samples:
                    write_samples(self.folder / "samples" / member.name, found["samples"])
                result = self.results[member.name]
                result.add_scores(as_json({key: found.get(key) for key in LM_EVAL_KEYS.values()}))
                seconds = time.perf_counter() - start
                result.tasks[task] = FinishedTask(seconds, self.harness.log_samples)
                self._store(member, result)
            progress.update()
        lm.forget()

    def _store(self, member: SeriesMember, result: Result) -> None:
        result = replace(result, **self.made_by)
        self.results[member.name] = result
        write_result(self.folder, member.name, result)
