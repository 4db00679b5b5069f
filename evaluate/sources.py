"""What a task's scores come from, as hashes by name: its config, its prompts, its documents, and
the versions of the libraries. A stored score is only reused where all of them are the same.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
"""Libraries that scores depend on."""


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def sources_of(loaded: TaskDict) -> dict[str, str]:
    """Hashes of tasks and groups whose requests have been built."""
    tasks, groups = loaded["tasks"].values(), loaded.get("groups", {}).values()
    configs = [config_of(task) for task in tasks]
    configs += [[vars_of_group(group)] for group in groups]
    return {
        "task config": _hash(configs),
        "prompts": _hash(
            [instance.doc_id, instance.request_type, instance.args, instance.repeats]
            for task in tasks
            for instance in task.instances
        ),
        "documents": _hash(
            document
            for task in tasks
            for document in {instance.doc_id: instance.doc for instance in task.instances}.values()
        ),
    }


def generates(loaded: TaskDict) -> bool:
    """Whether one of some tasks has models generate text. Their requests have been built."""
    return any(
        instance.request_type == "generate_until"
        for task in loaded["tasks"].values()
        for instance in task.instances
    )


def config_of(task: Task) -> list[Any]:
    """A task's resolved config. Functions count with the files they are defined in, and local
    metrics with theirs. Where the task file lies does not count.
    """
    config = task.config.to_dict(keep_callable=True)
    metadata = config.get("metadata") or {}
    config["metadata"] = {key: metadata[key] for key in metadata if key != "config_source"}
    metrics = [metric["metric"] for metric in config.get("metric_list") or []]
    files = [path for name in metrics if isinstance(name, str) for path in Path(name).glob("*.py")]
    return [type(task), config, [_file_hash(path) for path in sorted(files)]]


def config_hash(task: Task) -> str:
    return _hash([config_of(task)])


def vars_of_group(group: Any) -> Mapping[str, Any]:
    return {
        "name": group.name,
        "metrics": [vars(metric) for metric in group.aggregate_metric_list or []],
        "children": group.child_names,
    }


def _hash(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, default=_plain, ensure_ascii=False)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value that is not JSON as one that is, the same in every process."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if callable(value):
        defined = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        name = f"{defined.__module__}.{defined.__qualname__}"
        try:
            return [name, _file_hash(Path(inspect.getfile(inspect.unwrap(defined))))]
        except (TypeError, OSError):  # built in
            return name
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return handle_non_serializable(value)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
