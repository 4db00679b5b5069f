"""Which lm-eval tasks are run, loaded before any weights so that a missing one is noticed."""

import difflib
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

PAPER_SUITE = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "race",
    "mmlu",
    "rte",
    "wikitext",
    "gsm8k_cot",
    "ifeval",
    "hendrycks_math",
)
"""The suite of arXiv 2510.05064: classification, perplexity and generation."""


class LoadedTasks(NamedTuple):
    by_name: dict[str, list[Task | Group]]
    """Requested name to one task or group, or to the tasks of a tag."""
    failures: dict[str, str]
    """Names whose data cannot be had here, and why."""


def load_tasks(
    names: Sequence[str], include_path: str | None = None, trust_remote_code: bool = False
) -> LoadedTasks:
    """The named tasks and groups with their data; those without data do not stop the others.

    `include_path` is a folder of task files, which come before lm-eval's own. A metric that Hugging
    Face's `evaluate` would download is code, so it runs only with `trust_remote_code`; a metric in
    a local folder runs.

    Raises ValueError for an unknown task, and for a metric that cannot be loaded, which lm-eval
    would leave out of the results.
    """
    if not names:
        raise ValueError("no tasks: name some with --tasks, separated by commas")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path}: there is no such folder")
    if not trust_remote_code:
        refuse_metric_downloads()
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of each setting left at its default
    logging.getLogger("lm_eval.api.registry").setLevel(logging.CRITICAL)  # said below, in one line
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=include_path)  # scans all of lm-eval's own: seconds
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.task_index, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
        raise ValueError(f"tasks={','.join(unknown)}: lm-eval has no such task, {hint}")
    loaded: dict[str, list[Task | Group]] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # tasks are code, data sets and a network: anything may happen
            failures[name] = reason(error)
            continue
        group = found["groups"].get(name)
        loaded[name] = [*found["tasks"].values()] if group is None else [group]
    for task in leaves([task for tasks in loaded.values() for task in tasks]):
        if task.config.process_results is not None:
            continue  # such a task computes its metrics itself
        for metric, function in task._metric_fn_list.items():
            if function is None:
                raise ValueError(
                    f"task {task.task_name}: its metric {metric} cannot be loaded. A metric of "
                    "Hugging Face's evaluate is downloaded code: give --trust_remote_code to run "
                    "it, "
                    "or the path of a local metric folder in the task file"
                )
    return LoadedTasks(loaded, failures)


def reason(error: Exception) -> str:
    """An error as one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def leaves(tasks: Sequence[Task | Group]) -> list[Task]:
    return [
        leaf
        for task in tasks
        for leaf in (task.get_all_tasks() if isinstance(task, Group) else [task])
    ]


def texts_of(task: Task, limit: float | None) -> Iterator[str]:
    """Whatever is text in the documents a task is evaluated on; nothing where they cannot be read,
    which is said when the task is run.
    """
    num_documents = int(limit) if limit is not None and limit >= 1 else None
    try:
        for document in islice(task.eval_docs, num_documents):
            yield from (leaf for leaf in tree_leaves(document) if isinstance(leaf, str))
    except Exception as error:  # tasks are code
        logger.info("%s: its documents cannot be read (%s)", task.task_name, error)


def refuse_metric_downloads() -> None:
    """From here on Hugging Face's `evaluate` loads metrics from local folders only."""
    from evaluate import loading

    if getattr(loading.evaluation_module_factory, "only_local", False):
        return
    find_any_module = loading.evaluation_module_factory

    def find_local_module(path: str, *args, **kwargs):
        script = Path(path) if path.endswith(".py") else Path(path, f"{Path(path).name}.py")
        if not script.is_file():
            raise ValueError(
                f"metric {path} would be downloaded and run: give --trust_remote_code to allow it"
            )
        return find_any_module(path, *args, **kwargs)

    find_local_module.only_local = True
    loading.evaluation_module_factory = find_local_module
