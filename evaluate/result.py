"""The result of one model of a sweep, and the JSON file it is kept in.

A sweep's folder has one such file per model, which grows task by task. A file is always complete: a
sweep that was killed continues with the tasks that its files lack.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluate.baselines import BASELINES
from patching.files.outputs import write_json

LM_EVAL_KEYS = {
    "results": "results",
    "groups": "groups",
    "group_subtasks": "group_subtasks",
    "higher_is_better": "higher_is_better",
    "n_shot": "n-shot",
    "n_samples": "n-samples",
    "versions": "versions",
    "configs": "configs",
}
"""Fields of a `Result` that lm-eval fills, each a dictionary by task, with lm-eval's own keys."""

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
    seconds: float
    has_samples: bool


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
    settings: dict[str, Any] | None = None
    """Everything that changes this model's scores."""
    cost: Cost | None = None
    similarity: Similarity | None = None
    tasks: dict[str, FinishedTask] = field(default_factory=dict)
    """Requested tasks that are finished."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    group_subtasks: dict[str, list[str]] = field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    n_shot: dict[str, int] = field(default_factory=dict)
    n_samples: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    arguments: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    sweep: str | None = None
    """The sweep's name in a report on several sweeps. It is not stored."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """The result in a JSON file. Keys that are not known are ignored."""
        keys = {f.name: LM_EVAL_KEYS.get(f.name, f.name) for f in fields(cls)}
        known = {name: values[key] for name, key in keys.items() if values.get(key) is not None}
        for name, kind in (("parameters", Parameters), ("cost", Cost), ("similarity", Similarity)):
            if name in known:
                known[name] = kind(**known[name])
        tasks = {name: FinishedTask(**task) for name, task in known.get("tasks", {}).items()}
        return cls(**{"num_layers_to_patch": None} | known | {"tasks": tasks})

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds. Fields without a value are left out."""
        always = ("num_layers_to_patch", "tasks", "results", "group_subtasks")
        return {
            LM_EVAL_KEYS.get(name, name): value
            for name, value in asdict(self).items()
            if name != "sweep" and (name in always or value not in (None, {}))
        }

    def add_scores(self, found: Mapping[str, Any]) -> None:
        """Add what lm-eval found on further tasks, as plain JSON values."""
        for name, key in LM_EVAL_KEYS.items():
            getattr(self, name).update(found.get(key) or {})

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


def read_results(folder: Path) -> dict[str, Result]:
    """The results in a sweep's folder, by name. Raises ValueError for a damaged file."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): remove it") from error
        if isinstance(values, dict) and "series" in values and "results" in values:
            found[path.stem] = Result.from_dict(values)
    return found


def write_result(folder: Path, name: str, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result.to_dict())
