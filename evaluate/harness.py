"""One model on one task, run by lm-eval, and the samples it can write."""

import functools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.utils
import numpy
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.caching.cache import delete_cache
from lm_eval.evaluator import evaluate, get_sample_size
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable, sanitize_list

from evaluate.harness_arguments import HarnessArguments
from evaluate.seeds import DEFAULT_SEEDS, Seeds
from evaluate.sources import sources_of
from patching.files.outputs import write_text


@dataclass(frozen=True)
class Harness:
    """lm-eval's settings for all tasks. Prompts are built once, and used by every model with the
    same chat template.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    log_samples: bool = False
    seeds: Seeds = DEFAULT_SEEDS
    documents: Mapping[str, list[int]] | None = None
    """By task, the documents to evaluate, all if it is None."""
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Changes of each task's generation arguments."""
    prompting: Mapping[str, Any] = field(default_factory=lambda: {"fewshot_as_multiturn": True})
    """Arguments of lm-eval's `evaluate`: chat template, system instruction, examples as turns."""
    bootstrap_iters: int = 100_000
    predict_only: bool = False
    """Keep answers, and compute no metrics."""
    caching: Mapping[str, bool] = field(default_factory=dict)
    """Arguments of lm-eval's `evaluate`: whether to keep prompts for further runs."""
    confirm_run_unsafe_code: bool = False

    @classmethod
    def of(cls, arguments: HarnessArguments) -> "Harness":
        cached = arguments.cache_requests
        if cached == "delete":
            delete_cache()
        return cls(
            arguments.num_fewshot,
            arguments.limit,
            arguments.log_samples,
            Seeds(*arguments.seeds),
            arguments.documents,
            arguments.values_of("gen_kwargs"),
            arguments.prompting,
            arguments.bootstrap_iters,
            arguments.predict_only,
            {
                "cache_requests": cached in ("true", "refresh"),
                "rewrite_requests_cache": cached == "refresh",
            },
            arguments.confirm_run_unsafe_code,
        )

    def prepare(self, loaded: TaskDict) -> None:
        """Set seeds and configs as `lm_eval.simple_evaluate` does before it builds prompts.

        Raises ValueError for a task that runs code of a model's making, unless that is confirmed.
        """
        compile_templates_once()
        self.seeds.set()
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self.confirm_run_unsafe_code:
                raise ValueError(
                    f"{name} runs code that a model has written: give --confirm_run_unsafe_code"
                )
            if self.gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", dict(self.gen_kwargs), update=True)
            if self.predict_only:
                task.override_metric(metric_name="bypass")
            own_num_fewshot = task.get_config("num_fewshot")
            if own_num_fewshot is None or (own_num_fewshot != 0 and self.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            task.set_fewshot_seed(seed=self.seeds.fewshot)

    def sources(self, loaded: TaskDict) -> dict[str, str]:
        """Hashes of what tasks ask, see `evaluate.sources`, and settings that are not in them."""
        self.prepare(loaded)
        for name, task in loaded["tasks"].items():
            task.build_all_requests = functools.partial(build_once, task, {})
            task.build_all_requests(
                limit=get_sample_size(task, self.limit),
                samples=None if self.documents is None else self.documents.get(name),
                # A chat template comes with a model.
                **{
                    name: of for name, of in self.prompting.items() if name != "apply_chat_template"
                },
                **self.caching,
            )
        others = {name: value for name, value in self.prompting.items() if name in CHANGE_PROMPTS}
        if self.bootstrap_iters != Harness.bootstrap_iters:
            others["bootstrap_iters"] = self.bootstrap_iters
        others = {name: str(value) for name, value in others.items() if value}
        return sources_of(loaded) | others

    def score(self, lm: LM, loaded: TaskDict) -> dict[str, Any]:
        """What lm-eval finds on some tasks and their groups, with samples.

        Seeds and settings are those of `lm_eval.simple_evaluate`. Calling that would take seconds
        more each time, because it asks pip what is installed.
        """
        self.prepare(loaded)
        limit = self.limit
        found = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            samples=None if self.documents is None else dict(self.documents),
            log_samples=True,  # scores of single documents are always kept
            bootstrap_iters=self.bootstrap_iters,
            confirm_run_unsafe_code=self.confirm_run_unsafe_code,
            **self.prompting,
            **self.caching,
        )
        for values in found["results"].values() if found else ():
            # A metric that is itself a standard error has none.
            for key in [key for key in values if "_stderr_stderr," in key]:
                del values[key]
        return found


CHANGE_PROMPTS = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction")


def build_once(task: Task, kept: dict[str, tuple[list[Instance], Any]], **how: Any) -> None:
    """Build a task's requests with `Task.build_all_requests`, or take those of an earlier call for
    the same chat template, without their answers. Random generators are left as building does.
    """
    key = how["tokenizer_name"] if how.get("apply_chat_template") else ""
    if key not in kept:
        type(task).build_all_requests(task, **how)
        kept[key] = task.instances, (random.getstate(), numpy.random.get_state())
        return
    task._instances, (of_python, of_numpy) = kept[key]
    random.setstate(of_python)
    numpy.random.set_state(of_numpy)
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}


@functools.cache
def compile_templates_once() -> None:
    """Make lm-eval compile each template once. It does so anew for each document, which is most of
    the time that it takes.
    """
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(environment.from_string)


def first_prompts(loaded: TaskDict) -> Iterator[str]:
    """The first prompt of each task whose requests have been built, and its target."""
    for name, task in loaded["tasks"].items():
        request = task.instances[0]
        yield (
            f"{name}, first prompt:\n{request.args[0]}\n(target: {task.doc_to_target(request.doc)})"
        )


def as_json(found: Any) -> Any:
    """lm-eval's findings as plain JSON values."""
    return json.loads(json.dumps(found, default=handle_non_serializable))


SAMPLES = "samples"
"""The folder of samples in a results folder."""


def write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write one file per task with one line per sample, as lm-eval's own `--log_samples` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, of_task in samples.items():
        lines = []
        for sample in of_task:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
                for i, values in enumerate(sample["arguments"])
            }
            plain = sample | {
                "arguments": arguments,
                "resps": sanitize_list(sample["resps"]),
                "filtered_resps": sanitize_list(sample["filtered_resps"]),
                "target": str(sample["target"]),
            }
            lines.append(json.dumps(plain, default=handle_non_serializable, ensure_ascii=False))
        write_text(folder / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines))
