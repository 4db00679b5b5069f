"""The models of a sweep, and the loop over tasks and models that computes what is not stored yet.

Models whose weights come from the same parents are kin: one lm-eval model speaks for all of them.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.utils import collect_env
from tqdm import tqdm
from transformers import PreTrainedModel

from evaluate.family import FamilyLM
from evaluate.masked_family import MaskedFamilyLM
from evaluate.measurements import last_layer_similarity, last_states, speed_and_memory
from evaluate.stored import SCORES, merge, read_results, write_result, write_samples
from evaluate.tasks import leaves, reason
from patching.recipe import Recipe
from patching.running.calibration import Calibration

logger = logging.getLogger(__name__)

NO_TASKS = TaskManager(include_defaults=False)
"""The harness's index of tasks, which it would build anew for every call: ours are loaded."""
# It also asks pip what is installed, each time.
collect_env.get_pretty_env_info = cache(collect_env.get_pretty_env_info)

MANY_MEMBERS = (FamilyLM, MaskedFamilyLM)
"""lm-eval models that speak for one member at a time."""

Tasks = Mapping[str, Sequence[Task | Group]]
"""What each requested name stands for: one task or group, or the tasks of a tag."""


NUM_DOCUMENTS = 32
"""Of a task, for comparing models on its text where no calibration text is given."""
TEXT_TOKENS = 256


def text_of_tasks(tasks: Tasks) -> Calibration | None:
    """What the first documents of the first task that can be read ask of a model."""
    for name, of_name in tasks.items():
        task = leaves(of_name)[0]
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            task.build_all_requests(limit=NUM_DOCUMENTS, rank=0, world_size=1)
        except Exception:
            logger.warning("%s: its text cannot be read, taking the next task's", name)
            continue
        texts = {}
        for request in task.instances:
            context, *rest = request.args
            # The documents of a task without contexts are its continuations.
            texts.setdefault(request.doc_id, context if context.strip() else str(rest[0]))
        return Calibration(
            f"the first {len(texts)} documents of {task.task_name}", [*texts.values()], TEXT_TOKENS
        )
    return None


class SeriesMember(NamedTuple):
    """One model of a sweep."""

    series: str
    """`family`, `random_student`, the name of a baseline, or `compare_` and a model's name."""
    num_layers_to_patch: int | None
    """None for a model that is set beside the family."""
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        if self.num_layers_to_patch is None:
            return self.series
        return f"{self.series}_k{self.num_layers_to_patch}"


class Loaded(NamedTuple):
    """The weights of kin."""

    lm: HFLM
    teacher: PreTrainedModel | None
    """What the members' last states are compared with."""


@dataclass(frozen=True)
class Kin:
    """Models that share their parents."""

    members: Sequence[SeriesMember]
    facts: Callable[[SeriesMember], dict[str, Any]]
    """What is written about a member beside its scores."""
    load: Callable[[Sequence[SeriesMember]], Loaded]
    """Some of the members, ready to run."""


@dataclass(frozen=True)
class Harness:
    """How tasks are run: the settings of lm-eval."""

    num_fewshot: int | None = None
    limit: float | None = None
    log_samples: bool = False

    def score(
        self, lm: HFLM, member: SeriesMember, tasks: Sequence[Task | Group]
    ) -> dict[str, Any] | None:
        """What lm-eval finds for one member on one task (or group); None on all ranks but the
        first.
        """
        if isinstance(lm, MANY_MEMBERS):
            lm.activate(member.name)
        limit = self.limit
        return simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=NO_TASKS,
            num_fewshot=self.num_fewshot,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            log_samples=self.log_samples,
        )


@dataclass
class Sweep:
    folder: Path
    harness: Harness
    tasks: Tasks
    text: Calibration | None
    """What members are compared with their teacher on."""
    made_by: Mapping[str, Any]
    """Arguments and versions, written into every file."""
    is_writer: bool = True
    """Whether this is the rank that measures and writes."""
    failures: dict[str, str] = field(default_factory=dict)
    """Tasks that could not be evaluated, and why."""

    def run(self, all_kin: Sequence[Kin]) -> None:
        """Compute and store whatever is not in the folder."""
        stored = read_results(self.folder)
        missing = [self._missing(kin, stored) for kin in all_kin]
        num_units = sum(len(members) for of_kin in missing for members in of_kin.values())
        # No smoothing: the first member of a task computes for all, so single units say little.
        with tqdm(
            total=num_units, desc="sweep", unit="score", smoothing=0, disable=not self.is_writer
        ) as progress:
            for kin, of_kin in zip(all_kin, missing):
                unmeasured = [m for m in kin.members if self._is_unmeasured(stored.get(m.name))]
                needed = {*unmeasured, *(m for members in of_kin.values() for m in members)}
                if not needed:
                    continue
                loaded = kin.load([m for m in kin.members if m in needed])
                if self.is_writer:
                    self._measure(kin, loaded, unmeasured, stored)
                for task, members in of_kin.items():
                    self._run_task(loaded.lm, task, members, stored, progress)
                del loaded  # before the next weights come

    def _missing(
        self, kin: Kin, stored: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[SeriesMember]]:
        """Task to the members that have no scores on it; without the tasks that all have."""

        def is_missing(member: SeriesMember, task: str) -> bool:
            finished = stored.get(member.name, {}).get("tasks", {}).get(task)
            return finished is None or (
                self.harness.log_samples and not finished.get("has_samples")
            )

        missing = {task: [m for m in kin.members if is_missing(m, task)] for task in self.tasks}
        return {task: members for task, members in missing.items() if members}

    def _is_unmeasured(self, result: Mapping[str, Any] | None) -> bool:
        if result is None:
            return True
        similarity = result.get("similarity")
        if similarity is None:
            return False
        return self.text is not None and similarity["sha256"] != self.text.sha256

    def _measure(
        self,
        kin: Kin,
        loaded: Loaded,
        members: Sequence[SeriesMember],
        stored: dict[str, dict[str, Any]],
    ) -> None:
        """Write what there is to say of members before they are scored."""
        if not members:
            return
        lm, teacher = loaded
        if teacher is not None and self.text is not None:
            batches = self.text.batches(lm.tokenizer, teacher.config)
            teacher_states = last_states(teacher, batches)
        for member in tqdm(members, desc="measuring", unit="model", leave=False):
            if isinstance(lm, MANY_MEMBERS):
                lm.activate(member.name)
            result = stored.get(member.name, {"results": {}, "tasks": {}})
            result |= kin.facts(member) | {"cost": speed_and_memory(lm.model)}
            if teacher is not None and self.text is not None:
                result["similarity"] = {
                    "to_teacher": last_layer_similarity(lm.model, batches, teacher_states),
                    "text": self.text.name,
                    "sha256": self.text.sha256,
                }
            stored[member.name] = result | dict(self.made_by)
            write_result(self.folder, member.name, stored[member.name])

    def _run_task(
        self,
        lm: HFLM,
        task: str,
        members: Sequence[SeriesMember],
        stored: dict[str, dict[str, Any]],
        progress: tqdm,
    ) -> None:
        """Score all members on one task; where it fails, say so and leave the rest of it."""
        for done, member in enumerate(members):
            progress.set_postfix_str(f"{task} {member.name}")
            start = time.perf_counter()
            try:
                found = self.harness.score(lm, member, self.tasks[task])
            except Exception as error:
                if lm.world_size > 1:  # the other ranks wait for this one and cannot be told
                    error.add_note(f"while evaluating {member.name} on {task}")
                    raise
                logger.error("%s failed on %s", task, member.name, exc_info=True)
                self.failures[task] = reason(error)
                progress.update(len(members) - done)
                break
            if found is not None:
                self._store(member, task, found, time.perf_counter() - start, stored)
            progress.update()
        if isinstance(lm, MANY_MEMBERS):
            lm.forget()

    def _store(
        self,
        member: SeriesMember,
        task: str,
        found: dict[str, Any],
        seconds: float,
        stored: dict[str, dict[str, Any]],
    ) -> None:
        if self.harness.log_samples:
            write_samples(self.folder / "samples" / member.name, found["samples"])
        scores = {key: found[key] for key in SCORES if key in found}
        result = merge(stored[member.name], scores)
        finished = {"seconds": seconds, "has_samples": self.harness.log_samples}
        result["tasks"] = result["tasks"] | {task: finished}
        stored[member.name] = result | dict(self.made_by)
        write_result(self.folder, member.name, stored[member.name])
