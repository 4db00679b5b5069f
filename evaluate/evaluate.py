"""Evaluate one size, several, or the whole family between a student and its teacher.

    python -m evaluate.evaluate --teacher_model_name_or_path TEACHER --student_model_name_or_path
    STUDENT \\
        --save_directory DIR --num_layers_to_patch all --baselines naive

What is measured are lm-eval's tasks (`--tasks`), or on plain text (`--dataset`) the perplexity, of
masked language models the pseudo-perplexity.

Both models are loaded once; every size shares their weights. DIR receives one JSON file per model,
written task by task, and a report (summary.md, .csv, .json, .png, .svg). A sweep that was stopped
goes on where it was when it is started again. Under torchrun the ranks share the requests. """

import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from evaluate.devices import ranks_of, stock_lm
from evaluate.family import FamilyLM
from evaluate.masked_family import MaskedFamilyLM
from evaluate.report import short_names, write_report
from evaluate.stored import check_settings, read_results
from evaluate.sweep import Harness, Kin, Loaded, SeriesMember, Sweep, Tasks, text_of_tasks
from evaluate.tasks import PAPER_SUITE, LoadedTasks, leaves, load_tasks, texts_of
from evaluate.text_task import TextArguments, read_texts, task_of_texts
from patching.architectures.distilbert import as_bert_config
from patching.architectures.models import load_model, predicts_masked_tokens
from patching.arguments import DTYPES, CalibrationArguments, MeasuringArguments, calibration_of
from patching.assemble import count_parameters
from patching.blocks import Order
from patching.checkpoints.fingerprint import fingerprint
from patching.cli.command_line import CommandLineParser, user_errors
from patching.cli.units import parse_sizes
from patching.family import Family, usable_device
from patching.files.outputs import check_writable, environment, write_json
from patching.files.texts import num_found_in
from patching.orders.measurements import MEASURED_FILE_NAME, Measurements
from patching.orders.named_searches import searched_order
from patching.patch_order import NAMED_ORDERS, SEARCHED_ORDERS
from patching.recipe import Parent, Reference, whole_model
from patching.running.block_influence import block_influence, most_influential
from patching.running.calibration import Calibration

BASELINES = ("naive", "block_influence")


@dataclass
class EvaluationArguments(TextArguments, CalibrationArguments, MeasuringArguments):
    save_directory: Path = field(kw_only=True, metadata={"help": "folder for results"})
    num_layers_to_patch: str = field(
        default="all", metadata={"help": "sizes to evaluate: 4, or 1,3,5, or 0-5, or all"}
    )
    baselines: str | None = field(
        default=None,
        metadata={
            "help": "evaluated beside each size, separated by commas: naive (the teacher pruned to "
            "the same depth without distillation), block_influence (the teacher without the layers "
            "that change its calibration text's states the least, as ShortGPT prunes)"
        },
    )
    random_student: str | None = field(
        default=None,
        metadata={
            "help": "a second student of the same teacher, such as one distilled from random "
            "weights: its family is evaluated beside the first"
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "any other model, or a folder of models, set beside the family; repeatable",
            "action": "extend",
        },
    )
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "lm-eval tasks, separated by commas; by default the paper's suite, with "
            "--dataset none"
        },
    )
    include_path: str | None = field(
        default=None, metadata={"help": "folder with task files of your own"}
    )
    limit: float | None = field(
        default=None, metadata={"help": "documents per task, below 1 a share of them"}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "examples in the prompt, by default each task's own number"}
    )
    log_samples: bool = field(
        default=False, metadata={"help": "write each document, answer and score, too"}
    )
    eval_batch_size: str = field(default="4", metadata={"help": "rows per forward pass, or auto"})
    dtype: str = field(
        default="bfloat16", metadata={"help": "dtype of the weights", "choices": DTYPES}
    )

    def __post_init__(self) -> None:
        takes_influence = "block_influence" in self.baseline_names
        problems = self.check_calibration(
            "block influence is measured on text" if takes_influence else None
        )
        if self.limit is not None and self.limit <= 0:
            problems.append(f"limit={self.limit}: choose a number above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"num_fewshot={self.num_fewshot}: choose 0 or more")
        batch_size = self.eval_batch_size
        if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
            problems.append(f"eval_batch_size={batch_size}: choose 1 or more, or auto")
        if set(self.baseline_names) - set(BASELINES):
            problems.append(f"baselines={self.baselines}: choose from {', '.join(BASELINES)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def baseline_names(self) -> list[str]:
        return split_names(self.baselines or "")

    @property
    def task_names(self) -> list[str]:
        if self.tasks is None:
            return [] if self.dataset else list(PAPER_SUITE)
        return split_names(self.tasks)

    @property
    def batch_size(self) -> int | str:
        return self.eval_batch_size if self.eval_batch_size == "auto" else int(self.eval_batch_size)

    @property
    def harness(self) -> Harness:
        return Harness(self.num_fewshot, self.limit, self.log_samples)


def split_names(text: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


class Weights:
    """The parents of the families, read when they are first asked for; they share a teacher."""

    def __init__(
        self,
        arguments: EvaluationArguments,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Accelerator | None,
    ) -> None:
        self.arguments, self.dtype, self.device, self.ranks = arguments, dtype, device, ranks
        self.teacher: PreTrainedModel | None = None

    def of(self, family: Family) -> dict[Parent, PreTrainedModel]:
        if self.teacher is None:
            self.teacher = family.load(["teacher"], self.dtype, self.device)["teacher"]
        return {"teacher": self.teacher, **family.load(["student"], self.dtype, self.device)}

    def family_lm(self, family: Family, members: Sequence[SeriesMember]) -> Loaded:
        recipes = {member.name: member.recipe for member in members}
        common = {**self.of(family), "tokenizer": family.tokenizer, "accelerator": self.ranks}
        if predicts_masked_tokens(family.configs["teacher"]):
            return Loaded(MaskedFamilyLM(recipes, **common), self.teacher)
        lm = FamilyLM(recipes, **common, batch_size=self.arguments.batch_size)
        return Loaded(lm, self.teacher)

    def compared_lm(self, name_or_path: str, members: Sequence[SeriesMember]) -> Loaded:
        trust = self.arguments.trust_remote_code
        model = load_model(Reference(name_or_path), self.dtype, trust).to(self.device).eval()
        tokenizer = read_tokenizer(name_or_path, trust)
        if predicts_masked_tokens(model.config):
            (member,) = members
            recipes = {member.name: whole_model(model.config.num_hidden_layers)}
            lm = MaskedFamilyLM(recipes, teacher=model, tokenizer=tokenizer, accelerator=self.ranks)
            return Loaded(lm, None)
        return Loaded(stock_lm(model, tokenizer, self.arguments.batch_size, self.ranks), None)


def read_tokenizer(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """A model's own, padding on the left as batched generation needs."""
    return AutoTokenizer.from_pretrained(
        name_or_path, trust_remote_code=trust_remote_code, padding_side="left"
    )


def second_family(family: Family, arguments: EvaluationArguments) -> Family:
    """The teacher and `--random_student`, patched in the same order where its layers allow it: one
    from a file or a search belongs to the layers it was found for.
    """
    other = dataclasses.replace(
        arguments,
        student_model_name_or_path=arguments.random_student,
        student_revision=None,
        order=arguments.order if arguments.order in NAMED_ORDERS else None,
    )
    second = Family.from_pretrained(other)
    if second.layer_map == family.layer_map:
        return dataclasses.replace(second, order=family.order)
    return second


def compared_models(names: list[str]) -> dict[str, str]:
    """Series to the model it is about; a folder of models stands for each of them."""
    models = []
    for name in names:
        folder = Path(name)
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        if folder.is_dir() and not (folder / "config.json").is_file():
            if not inside:
                raise ValueError(f"compare={name}: there is no model in this folder")
            models += map(str, inside)
        else:
            models.append(name)
    models = list(dict.fromkeys(models))
    return {f"compare_{short}": name for short, name in zip(short_names(models), models)}


def family_members(family: Family, sizes: list[int], baselines: list[str]) -> list[SeriesMember]:
    """The family and its naive baseline. At k = max pruning leaves the teacher, which is there
    already.
    """
    members = [SeriesMember("family", k, family.recipe(k)) for k in sizes]
    if "naive" in baselines:
        members += [
            SeriesMember("naive", k, family.naive_recipe(k)) for k in pruned_sizes(family, sizes)
        ]
    return members


def pruned_sizes(family: Family, sizes: list[int]) -> list[int]:
    return [k for k in sizes if k < family.layer_map.max_layers_to_patch]


def influences_of_layers(
    family: Family, weights: Weights, text: Calibration, settings: dict[str, Any]
) -> list[float]:
    """The teacher's block influences, kept in the folder so that a further run has them."""
    path = weights.arguments.save_directory / "block_influence.json"
    made_from = {"teacher": settings["teacher"], "dtype": settings["dtype"], "text": text.sha256}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("made_from") == made_from:
            return kept["block_influence"]
    teacher = weights.of(family)["teacher"]
    influences = block_influence(teacher, text.batches(family.tokenizer, teacher.config))
    if is_writer(weights.ranks):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"block_influence": influences, "text": text.name, "made_from": made_from}
        write_json(path, values)
    return influences


def is_writer(ranks: Accelerator | None) -> bool:
    return ranks is None or ranks.is_main_process


SHARED_SETTINGS = ("teacher", "dtype", "limit", "num_fewshot", "include_path")


@dataclass
class Plan:
    """What a command line asks for, checked from configs alone."""

    arguments: EvaluationArguments
    family: Family
    sizes: list[int]
    second: Family | None
    """The random student's, its teacher the same."""
    compared: dict[str, str]
    compared_configs: dict[str, PreTrainedConfig]
    calibration: Calibration | None
    texts: list[str]
    """Of `--dataset`."""
    dtype: torch.dtype

    @classmethod
    def of(cls, arguments: EvaluationArguments) -> "Plan":
        """Raises ValueError or OSError where something is not there or does not fit."""
        family = Family.from_pretrained(arguments)
        _ = family.tokenizer  # one that is missing is noticed here
        compared = compared_models(arguments.compare)
        trust = arguments.trust_remote_code
        teacher = family.configs["teacher"]
        if predicts_masked_tokens(teacher) and not (arguments.dataset or arguments.tasks):
            raise ValueError(
                f"a {teacher.model_type} predicts masked tokens: name text to evaluate it on with "
                "--dataset"
            )
        configs = {}
        for series, name in compared.items():
            try:
                config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
                tokenizer = read_tokenizer(name, trust)
            except (OSError, ValueError) as error:
                raise ValueError(f"compare={name}: no model that can be read ({error})") from error
            configs[series] = as_bert_config(config)
            if arguments.dataset and tokenizer.get_vocab() != family.tokenizer.get_vocab():
                raise ValueError(
                    f"compare={name}: its tokens are others than the teacher's, so its perplexity "
                    "cannot be set beside the family's: leave out --dataset, or this model"
                )
        return cls(
            arguments,
            family,
            parse_sizes(arguments.num_layers_to_patch, family.layer_map.max_layers_to_patch),
            second_family(family, arguments) if arguments.random_student else None,
            compared,
            configs,
            calibration_of(arguments)
            or (Calibration.read(arguments) if arguments.calibration else None),
            read_texts(arguments, arguments.limit) if arguments.dataset else [],
            family.dtype(arguments.dtype),
        )

    def measurements(self, weights: Weights) -> Measurements:
        """What `--order` is searched by, kept in the folder so that a further run has it."""
        path = self.arguments.save_directory / MEASURED_FILE_NAME
        family = self.family
        return Measurements(family, self.calibration, self.dtype, lambda: weights.of(family), path)

    def follow(self, order: Order, ranks: Accelerator | None) -> None:
        """Take the order that was searched, the first rank's on all of them: it alone searches."""
        if ranks is not None:
            (order,) = broadcast_object_list([order])
        self.family = dataclasses.replace(self.family, order=order)
        if self.second is not None and self.second.layer_map == self.family.layer_map:
            self.second = dataclasses.replace(self.second, order=order)

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """By series, what changes its numbers."""
        arguments, family = self.arguments, self.family
        path = arguments.include_path
        shared = {
            "teacher": fingerprint(arguments.teacher_model_name_or_path, family.configs["teacher"]),
            "dtype": str(self.dtype).removeprefix("torch."),
            "limit": arguments.limit,
            "num_fewshot": arguments.num_fewshot,
            "include_path": None if path is None else str(Path(path).resolve()),
        }
        if self.texts:
            digest = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()
            shared[f"text {arguments.text_name}"] = digest
        settings = {}
        for series, of_family in (("family", family), ("random_student", self.second)):
            if of_family is not None:
                name = of_family.arguments.student_model_name_or_path
                student = fingerprint(name, of_family.configs["student"])
                settings[series] = shared | {"student": student, "order": of_family.order}
        settings["naive"] = settings["family"]
        if self.calibration is not None:
            settings["block_influence"] = settings["family"] | {
                "calibration": self.calibration.sha256
            }
        for series, name in self.compared.items():
            model = fingerprint(name, self.compared_configs[series])
            settings[series] = shared | {"model": model}
        return settings

    def tasks(self) -> LoadedTasks:
        """The text, and lm-eval's tasks."""
        arguments, tasks, failures = self.arguments, {}, {}
        if arguments.task_names or not self.texts:
            tasks, failures = load_tasks(
                arguments.task_names, arguments.include_path, arguments.trust_remote_code
            )
        if self.texts:
            name, config = arguments.text_name, self.family.configs["teacher"]
            task = task_of_texts(name, self.texts, self.family.tokenizer, config)
            tasks = {name: [task], **tasks}
        return LoadedTasks(tasks, failures)

    def kin(self, weights: Weights) -> list[Kin]:
        """All models of the sweep. Reads the teacher where its influences are not known yet."""
        family, sizes = self.family, self.sizes
        members = family_members(family, sizes, self.arguments.baseline_names)
        if "block_influence" in self.arguments.baseline_names:
            influences = influences_of_layers(
                family, weights, self.calibration, self.settings["block_influence"]
            )
            members += [
                SeriesMember(
                    "block_influence", k, most_influential(influences, family.recipe(k).depth)
                )
                for k in pruned_sizes(family, sizes)
            ]
        kin = [self._kin_of(family, members, weights)]
        if self.second is not None:
            members = [
                SeriesMember("random_student", k, self.second.recipe(k))
                for k in pruned_sizes(self.second, sizes)
            ]
            kin.append(self._kin_of(self.second, members, weights))
        for series, name in self.compared.items():
            load = partial(weights.compared_lm, name)
            kin.append(Kin([SeriesMember(series, None)], self._facts_of_compared, load))
        return kin

    def _kin_of(self, family: Family, members: list[SeriesMember], weights: Weights) -> Kin:
        return Kin(members, partial(self._facts, family), partial(weights.family_lm, family))

    def _facts(self, family: Family, member: SeriesMember) -> dict[str, Any]:
        config = family.config(member.recipe)
        return {
            "series": member.series,
            "num_layers_to_patch": member.num_layers_to_patch,
            "max_layers_to_patch": family.layer_map.max_layers_to_patch,
            "order": family.order,
            "depth": member.recipe.depth,
            "parameters": self._parameters(config),
            "recipe": member.recipe.to_dict(),
            "settings": self.settings[member.series],
        }

    def _facts_of_compared(self, member: SeriesMember) -> dict[str, Any]:
        config = self.compared_configs[member.series]
        return {
            "series": member.series,
            "num_layers_to_patch": None,
            "depth": config.num_hidden_layers,
            "parameters": self._parameters(config),
            "settings": self.settings[member.series],
        }

    def _parameters(self, config: PreTrainedConfig) -> dict[str, int]:
        return count_parameters(config, self.arguments.trust_remote_code)._asdict()


def warn_of_shared_texts(calibration: Calibration, tasks: Tasks, limit: float | None) -> None:
    """Say of each task how many of the texts that models are chosen by are evaluated on, too."""
    for task in leaves([task for of_name in tasks.values() for task in of_name]):
        if num_shared := num_found_in(calibration.texts, texts_of(task, limit)):
            warnings.warn(
                f"{num_shared} of the {len(calibration.texts)} calibration texts stand in "
                f"{task.task_name} too: it is no unseen text for what is chosen by them",
                stacklevel=2,
            )


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            EvaluationArguments, prog="evaluate.evaluate", description=__doc__
        )
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        folder = arguments.save_directory
        check_writable(folder)
        plan = Plan.of(arguments)
        if arguments.order not in SEARCHED_ORDERS:
            check_settings(folder, read_results(folder), plan.settings, SHARED_SETTINGS)
        device = usable_device(arguments.device)
        tasks, failures = plan.tasks()
        ranks = ranks_of(device)
    if ranks is not None:
        device = ranks.device
        for of_rank in gather_object([failures]):  # what one rank has not got none evaluates
            failures |= of_rank
        tasks = {name: of_name for name, of_name in tasks.items() if name not in failures}
    if plan.calibration is not None and is_writer(ranks):
        warn_of_shared_texts(plan.calibration, tasks, arguments.limit)
    weights = Weights(arguments, plan.dtype, device, ranks)
    if arguments.order in SEARCHED_ORDERS:
        with user_errors():
            measure = plan.measurements(weights)
        order = searched_order(measure) if is_writer(ranks) else plan.family.order
        plan.follow(order, ranks)
        with user_errors():
            check_settings(folder, read_results(folder), plan.settings, SHARED_SETTINGS)
    sweep = Sweep(
        folder,
        arguments.harness,
        tasks,
        plan.calibration or text_of_tasks(tasks),
        {"arguments": dataclasses.asdict(arguments), "environment": environment()},
        is_writer=is_writer(ranks),
        failures=failures,
    )
    if tasks:
        sweep.run(plan.kin(weights))
    if sweep.is_writer:
        results = [*read_results(folder).values()]
        if results:
            print(write_report(results, folder, sweep.failures))
            print(f"report: {folder / 'summary.md'}")
        for task, reason in sweep.failures.items():
            print(f"failed: {task}: {reason}", file=sys.stderr)
    if sweep.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
