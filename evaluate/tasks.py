"""lm-eval tasks by name. They load before any weights, so that a missing task is noticed early."""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict
from torch.utils._pytree import tree_leaves
from yaml import YAMLError

from evaluate.seeds import DEFAULT_SEEDS, Seeds
from evaluate.sources import config_hash
from patching.files.texts import num_found_in
from patching.running.calibration import Calibration

logger = logging.getLogger(__name__)

Tasks = Mapping[str, TaskDict]
"""By requested name the tasks and groups it names, as lm-eval loads them."""

NUM_DOCUMENTS = 32
"""Documents of a task that members are compared on if there is no calibration text."""
TEXT_TOKENS = 256


class LoadedTasks(NamedTuple):
    by_name: dict[str, TaskDict]
    failures: dict[str, str]
    """Names whose data cannot be loaded, and why."""


def load_tasks(
    names: Sequence[str],
    include_path: str | None = None,
    trust_remote_code: bool = False,
    seeds: Seeds = DEFAULT_SEEDS,
    metadata: Mapping[str, Any] | None = None,
) -> LoadedTasks:
    """The named tasks, groups and tags with their data. Those without data do not stop the others.
    A name may be a pattern such as `arc_*`, a task file, or a pattern of files.
    A task that several of them contain is one object in all of them.

    Each name is loaded as if it were the only one, with the seeds set before: some tasks shuffle
    their documents or choices as they load.

    `include_path` is a folder of task files, which take precedence over lm-eval's own. A metric
    that Hugging Face's `evaluate` would download is code, so it runs only with `trust_remote_code`.
    A metric in a local folder always runs.

    Raises ValueError for an unknown task, and for a metric that cannot be loaded, which lm-eval
    would leave out of the results. Also for a task that is not the same in two of the groups.
    """
    if not names:
        raise ValueError("no tasks: name some with --tasks, separated by commas")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path}: there is no such folder")
    if not trust_remote_code:
        refuse_metric_downloads()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default it applies
    logging.getLogger("lm_eval.api.registry").setLevel(logging.CRITICAL)  # reported below
    specs, manager = specs_of(names, include_path, metadata)
    loaded, failures = {}, {}
    for name, spec in specs.items():
        try:
            seeds.set()
            loaded[name] = manager.load([spec])
        except Exception as error:  # tasks are code, data sets and a network: anything may happen
            failures[name] = reason(error)
    for task in all_tasks(loaded):
        if task.config.process_results is not None:
            continue  # such a task computes its metrics itself
        for metric, function in task._metric_fn_list.items():
            if function is None:
                raise ValueError(
                    f"task {task.task_name}: its metric {metric} cannot be loaded. A metric of "
                    "Hugging Face's evaluate is downloaded code: give --trust_remote_code to run "
                    "it, or the path of a local metric folder in the task file"
                )
    merge_repeated(loaded)
    return LoadedTasks(loaded, failures)


def specs_of(
    names: Sequence[str], include_path: str | None, metadata: Mapping[str, Any] | None
) -> tuple[dict[str, str | dict[str, Any]], TaskManager]:
    """By name, what a task manager loads: a name that it knows, or the config in a task file.

    Raises ValueError for a name that is neither, and for a file that cannot be read.
    """
    specs: dict[str, str | dict[str, Any]] = {}
    manager = TaskManager(
        include_path=include_path, include_defaults=False, metadata=dict(metadata or {})
    )
    known = [name for name in names if not name.endswith(".yaml")]
    if any(not manager.match_tasks([name]) for name in known):
        # Indexing lm-eval's own takes seconds.
        manager = TaskManager(include_path=include_path, metadata=dict(metadata or {}))
    unknown = []
    for name in names:
        files = sorted(glob(name)) if name.endswith(".yaml") else []
        for file in files:
            try:
                config = load_yaml(Path(file).absolute(), resolve_func=True)
            except (OSError, ValueError, YAMLError) as error:
                raise ValueError(f"tasks={file}: this is not a task file ({error})") from error
            of_name = config.get("group", config.get("task"))
            if not isinstance(of_name, str):
                raise ValueError(f"tasks={file}: this file names no task")
            specs[of_name] = config
        matches = [] if files else manager.match_tasks([name])
        specs |= {match: match for match in matches}
        if not files and not matches:
            unknown.append(name)
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.task_index, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
        raise ValueError(f"tasks={','.join(unknown)}: lm-eval has no such task, {hint}")
    return specs, manager


def merge_repeated(loaded: Tasks) -> None:
    """Make a task that several requested names contain one object."""
    first: dict[str, tuple[str, Task]] = {}
    for name, of_name in loaded.items():
        for task_name, task in of_name["tasks"].items():
            other_name, other = first.setdefault(task_name, (name, task))
            if other is not task and config_hash(other) != config_hash(task):
                raise ValueError(
                    f"tasks: {task_name} has other settings in {name} than in {other_name}, and "
                    "results have room for one: give them a --save_directory each"
                )
            of_name["tasks"][task_name] = other


def overlapping(loaded: Tasks) -> list[list[str]]:
    """The requested names, in lists of those that have tasks in common: these run together."""
    parts: list[tuple[list[str], set[str]]] = []
    for name, of_name in loaded.items():
        names, tasks = [name], set(of_name["tasks"])
        for part in [part for part in parts if part[1] & tasks]:
            parts.remove(part)
            names, tasks = part[0] + names, part[1] | tasks
        parts.append((names, tasks))
    return [names for names, _ in parts]


def union(loaded: Sequence[TaskDict]) -> TaskDict:
    """The tasks and groups of several names as those of one."""
    return {
        key: {name: value for of_name in loaded for name, value in of_name.get(key, {}).items()}
        for key in ("tasks", "groups", "group_map")
    }


def reason(error: Exception) -> str:
    """An error in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def all_tasks(loaded: Tasks) -> Iterable[Task]:
    return [task for of_name in loaded.values() for task in of_name["tasks"].values()]


def names_in(loaded: TaskDict) -> list[str]:
    """The tasks and groups that a requested name contains."""
    return [*loaded["tasks"], *loaded.get("groups", {})]


def text_of_tasks(loaded: Tasks) -> Calibration | None:
    """The text of the first documents of the first task whose documents can be read."""
    for name, of_name in loaded.items():
        task = next(iter(of_name["tasks"].values()))
        task.set_fewshot_seed(seed=DEFAULT_SEEDS.fewshot)
        try:
            task.build_all_requests(limit=NUM_DOCUMENTS, rank=0, world_size=1)
        except Exception:
            logger.warning("%s: its documents cannot be read, trying the next task", name)
            continue
        texts = {}
        for request in task.instances:
            context, *rest = request.args
            # Tasks without contexts have their text in the continuations.
            texts.setdefault(request.doc_id, context if context.strip() else str(rest[0]))
        return Calibration(
            f"the first {len(texts)} documents of {task.task_name}", [*texts.values()], TEXT_TOKENS
        )
    return None


def shared_texts(calibration: Calibration, loaded: Tasks, limit: float | None) -> Iterator[str]:
    """A line for the user for each task that has some of the calibration texts in its documents."""
    for task in all_tasks(loaded):
        if num_shared := num_found_in(calibration.texts, texts_of(task, limit)):
            yield (
                f"{num_shared} of the {len(calibration.texts)} calibration texts also appear in "
                f"{task.task_name}, so it is not unseen text for models chosen on them"
            )


def texts_of(task: Task, limit: float | None) -> Iterator[str]:
    """Every string in the documents a task is evaluated on. Nothing if they cannot be read, which
    running the task will report.
    """
    num_documents = int(limit) if limit is not None and limit >= 1 else None
    try:
        for document in islice(task.eval_docs, num_documents):
            yield from (leaf for leaf in tree_leaves(document) if isinstance(leaf, str))
    except Exception as error:  # tasks are code
        logger.info("%s: its documents cannot be read (%s)", task.task_name, error)


def refuse_metric_downloads() -> None:
    """Make Hugging Face's `evaluate` load metrics from local folders only, from now on."""
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
