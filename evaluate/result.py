"""The result of one model of a sweep, and the JSON file it is kept in.

A sweep's folder has one such file per model, which grows task by task. A file is always complete: a
sweep that was killed continues with the tasks that its files lack. Several sweeps may write into
one folder: each adds what it computed to what the file holds by then.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, TypeVar

from evaluate.baselines import BASELINES
from patching.cli.units import LARGEST_NUMBER
from patching.files.json_files import check_types, load_json, short_int
from patching.files.outputs import locked, write_json

LM_EVAL_KEYS = {
    "results": "results",
    "groups": "groups",
    "group_subtasks": "group_subtasks",
    "higher_is_better": "higher_is_better",
    "n_shot": "n-shot",
    "n_samples": "n-samples",
    "versions": "versions",
    "configs": "configs",
    "generation_failures": "generation_failures",
}
"""Fields of a `Result` that a run of lm-eval fills, each a dictionary by task. The last one is not
lm-eval's own.
"""

SERIES_LABELS = {
    "family": "interpolated",
    **{name: baseline.label for name, baseline in BASELINES.items()},
    "random_student": "interpolated, random student",
}


@dataclass(frozen=True)
class Parameters:
    stored: int
    """Distinct parameters: a tied matrix counts once."""
    both_counted: int
    """Embedding and head both counted. This grows with depth."""


@dataclass(frozen=True)
class Cost:
    """Speed and memory of a forward pass."""

    rows: int
    tokens_per_row: int
    tokens_per_second: float
    weights_bytes: int
    peak_beyond_weights_bytes: int
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Similarity:
    """Mean cosine between the last hidden states of a model and of its teacher."""

    to_teacher: float
    text: str
    """The name of the text they were compared on."""
    sha256: str
    """Hash of that text."""


@dataclass(frozen=True)
class FinishedTask:
    """A task that was asked for and is finished, and what its scores came from."""

    seconds: float
    has_samples: bool
    sources: dict[str, str] | None = None
    """Hashes and versions by name, see `evaluate.sources`. None in files that earlier versions
    wrote: nothing says which tasks, prompts and documents such scores belong to."""
    contains: list[str] = field(default_factory=list)
    """The tasks and groups in it, itself among them unless it is a tag."""
    run: str | None = None
    """The run that computed them, by its name in `Result.runs`."""


@dataclass(frozen=True)
class Run:
    """The command that computed some of a model's scores."""

    settings: dict[str, Any]
    """What all results in a folder must agree on."""
    arguments: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """A short name that other runs do not have."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class UnknownField(ValueError):
    """A newer version of this toolkit stored a field that this one does not know."""


T = TypeVar("T")


def stored_as(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from a JSON object. Raises UnknownField, and TypeError if a field is missing."""
    known = {f.name for f in fields(kind)}
    made = kind(**{name: value for name, value in values.items() if name in known})
    if unknown := sorted(values.keys() - known):
        raise UnknownField(f"{', '.join(map(repr, unknown[:3]))} of {kind.__name__}")
    return made


@dataclass
class Result:
    """Everything a sweep knows about one model."""

    series: str
    """`family`, `random_student`, the name of a baseline, or `compare_` and a model's name."""
    num_layers_to_patch: int | None
    """None for a compared model."""
    depth: int
    parameters: Parameters
    max_layers_to_patch: int | None = None
    order: str | list[int] | None = None
    recipe: dict[str, Any] | None = None
    cost: Cost | None = None
    similarity: Similarity | None = None
    tasks: dict[str, FinishedTask] = field(default_factory=dict)
    """Requested tasks that are finished."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    group_subtasks: dict[str, list[str]] = field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool | None]] = field(default_factory=dict)
    n_shot: dict[str, int] = field(default_factory=dict)
    n_samples: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation_failures: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts of `evaluate.answers.Failures`."""
    runs: dict[str, Run] = field(default_factory=dict)
    sweep: str | None = None
    """The sweep's name in a report on several sweeps. It is not in the file."""
    documents: dict[str, Any] = field(default_factory=dict, compare=False)
    """Scores of single documents, see `evaluate.documents`. They are in a file of their own."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """The result in a JSON file. Keys that are not known are ignored.

        Raises UnknownField for those inside a task, a run or other details: with them the details
        may mean something else.
        """
        keys = {f.name: LM_EVAL_KEYS.get(f.name, f.name) for f in fields(cls)}
        known = {name: values[key] for name, key in keys.items() if values.get(key) is not None}
        for name, kind in (("parameters", Parameters), ("cost", Cost), ("similarity", Similarity)):
            if name in known:
                known[name] = stored_as(kind, known[name])
        runs = {name: stored_as(Run, run) for name, run in known.get("runs", {}).items()}
        tasks = {name: stored_as(FinishedTask, of) for name, of in known.get("tasks", {}).items()}
        if "settings" in values:  # an earlier version: one run for the whole file
            run = Run(*(values.get(f.name) or {} for f in fields(Run)))
            runs[run.name] = run
            tasks = {name: replace(task, run=run.name) for name, task in tasks.items()}
        return cls(**{"num_layers_to_patch": None} | known | {"tasks": tasks, "runs": runs})

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds. Fields without a value are left out."""
        always = ("num_layers_to_patch", "tasks", "results", "group_subtasks")
        return {
            LM_EVAL_KEYS.get(name, name): value
            for name, value in asdict(replace(self, documents={})).items()
            if name != "sweep" and (name in always or value not in (None, {}))
        }

    def add_scores(
        self, tasks: Mapping[str, FinishedTask], run: Run, found: Mapping[str, Any]
    ) -> None:
        """Add what lm-eval found on further tasks, as plain JSON values."""
        for name, key in LM_EVAL_KEYS.items():
            getattr(self, name).update(found.get(key) or {})
        self.tasks |= {name: replace(task, run=run.name) for name, task in tasks.items()}
        used = {task.run for task in self.tasks.values()}
        self.runs = {name: of for name, of in (self.runs | {run.name: run}).items() if name in used}

    def finished(self, task: str) -> FinishedTask | None:
        """The task that was asked for and contains this task or group, None if that is not known.

        The one of this name comes first: others may contain the same.
        """
        if task in self.tasks:
            return self.tasks[task]
        return next((other for other in self.tasks.values() if task in other.contains), None)

    def run_of(self, task: str) -> Run | None:
        """The run that computed a task's scores, None if that is not known."""
        finished = self.finished(task)
        return self.runs.get(finished.run) if finished else None

    def settings_of(self, task: str) -> dict[str, Any]:
        """The settings that a task's scores were computed with, as far as known."""
        run = self.run_of(task)
        return run.settings if run else {}

    def is_unverified(self, task: str) -> bool:
        """Whether nothing says what a task's scores belong to."""
        finished = self.finished(task)
        return finished is None or finished.sources is None

    @property
    def series_position(self) -> int:
        """Where its series stands among others. Compared models come last."""
        order = list(SERIES_LABELS)
        return order.index(self.series) if self.series in order else len(order)

    @property
    def series_label(self) -> str:
        """The name of its series in plots, preceded by the sweep's if there are several."""
        label = SERIES_LABELS.get(self.series, self.series.removeprefix("compare_"))
        return f"{self.sweep}: {label}" if self.sweep else label

    @property
    def label(self) -> str:
        """The name of its row in tables: student, k = 1, ..., teacher, or another series at k."""
        k = self.num_layers_to_patch
        if k is None:
            return self.series_label
        if self.series != "family":
            return f"{self.series_label}, k = {k}"
        if k == self.max_layers_to_patch:
            label = "teacher" if k else "student = teacher"
        else:
            label = f"k = {k}" if k else "student"
        return f"{self.sweep}: {label}" if self.sweep else label


def read_result(path: Path) -> Result | None:
    """The result in a file, None if it holds none. Raises ValueError for a damaged file."""
    try:
        values = load_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it") from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from error
    if not isinstance(values, dict) or "series" not in values or "results" not in values:
        return None
    try:
        result = Result.from_dict(load_json(path, parse_int=short_int))
        check_result(result)
    except UnknownField as error:
        raise ValueError(
            f"{path} was written by a newer version of this toolkit ({error} is not known): update "
            "this one, or name another folder"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from error
    return result


IN_SETTINGS = {"limit": float | None, "seed": list[int | None] | str, "dtype": str}
IN_ARGUMENTS = {"shard": str | None}
IN_CONFIGS = {"output_type": str}
"""Types of what is read from the dictionaries of a run, and from a task's config."""
COUNTS = {
    "n_samples": ("original", "effective"),
    "generation_failures": ("answers", "cut", "looping", "failed"),
}
"""What is counted for each task."""


def check_result(result: Result) -> None:
    """Raise ValueError for values of other types than a sweep writes."""
    check_types(result, Result, "it")
    typed = [(config, IN_CONFIGS) for config in result.configs.values()]
    for run in result.runs.values():
        typed += [(run.settings, IN_SETTINGS), (run.arguments, IN_ARGUMENTS)]
    for values, kinds in typed:
        for name in values.keys() & kinds.keys():
            check_types(values[name], kinds[name], name)
    for field_name, names in COUNTS.items():
        for task, counts in getattr(result, field_name).items():
            if lacking := [name for name in names if name not in counts]:
                raise ValueError(f"{field_name} of {task} lacks {', '.join(lacking)}")
    check_sizes(result)
    if any(counts["answers"] < 1 for counts in result.generation_failures.values()):
        raise ValueError("there are failures of no answers")
    inside = {group: {*tasks} - {group} for group, tasks in result.group_subtasks.items()}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        raise ValueError("a group of tasks contains itself") from error


def check_sizes(result: Result) -> None:
    """Raise ValueError for sizes, counts and standard errors below 0, more layers than a model can
    have, and a member of a series without its size. Scores may be infinite or NaN: lm-eval finds
    such ones.
    """
    if result.series in SERIES_LABELS and result.num_layers_to_patch is None:
        raise ValueError(f"num_layers_to_patch is null, and the series is {result.series}")
    names = ("depth", "num_layers_to_patch", "max_layers_to_patch")
    layers = {name: getattr(result, name) for name in names}
    sizes = [*layers.items(), *vars(result.parameters).items()]
    sizes += vars(result.cost).items() if result.cost else ()
    for field_name in (*COUNTS, "results"):
        for task, values in getattr(result, field_name).items():
            sizes += [
                (f"{name} of {task}", value)
                for name, value in values.items()
                if field_name in COUNTS or name.partition(",")[0].endswith("_stderr")
            ]
    for name, size in sizes:
        if isinstance(size, int | float) and size < 0:
            raise ValueError(f"{name} is {size}")
    for name, count in layers.items():
        if count is not None and count > LARGEST_NUMBER:
            raise ValueError(f"{name} is {count}, and no model has more than {LARGEST_NUMBER:,}")


def read_results(folder: Path, names: Iterable[str] | None = None) -> dict[str, Result]:
    """The results in a sweep's folder, by name, all or those of some `names`. Raises ValueError for
    a damaged file.
    """
    if names is None:
        paths = sorted(folder.glob("*.json"))
    else:
        paths = [path for name in names if (path := folder / f"{name}.json").is_file()]
    found = {path.stem: read_result(path) for path in paths}
    return {name: result for name, result in found.items() if result is not None}


def update_result(folder: Path, name: str, change: Callable[[Result | None], Result]) -> Result:
    """Store and return what `change` makes of the stored result, None if there is none. Nobody else
    writes in between.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with locked(folder):
        result = change(read_result(path) if path.is_file() else None)
        write_json(path, result.to_dict())
    return result
