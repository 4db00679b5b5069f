"""Evaluate one size, several, or the whole family between a student and its teacher.

    python -m evaluate.evaluate --teacher_model_name_or_path TEACHER --student_model_name_or_path
    STUDENT \\
        --save_directory DIR --num_layers_to_patch all --baselines naive

Both models are loaded once; every size shares their weights. DIR receives one JSON file per model,
a table (summary.md, summary.csv) and a plot (summary.png, summary.svg). """

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from evaluate.report import write_report
from evaluate.tasks import PAPER_SUITE, load_tasks
from patching.assemble import assemble, count_parameters
from patching.blocks import parse_sizes
from patching.command_line import CommandLineParser, user_errors
from patching.outputs import check_writable, environment, write_json
from patching.pair import DTYPES, Pair, PairArguments
from patching.recipe import Recipe

BASELINES = ("naive",)


@dataclass
class EvaluationArguments(PairArguments):
    save_directory: Path = field(kw_only=True, metadata={"help": "folder for results"})
    num_layers_to_patch: str = field(
        default="all", metadata={"help": "sizes to evaluate: 4, or 1,3,5, or 0-5, or all"}
    )
    baselines: str | None = field(
        default=None,
        metadata={
            "help": "evaluated beside each size, separated by commas: naive (the teacher pruned "
            "to the "
            "same depth without distillation)"
        },
    )
    tasks: str = field(
        default=",".join(PAPER_SUITE), metadata={"help": "lm-eval tasks, separated by commas"}
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
    eval_batch_size: str = field(default="4", metadata={"help": "rows per forward pass, or auto"})
    dtype: str = field(
        default="bfloat16", metadata={"help": "dtype of the weights", "choices": DTYPES}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cuda, cuda:1, mps or cpu; by default a GPU where there is one"},
    )

    def __post_init__(self) -> None:
        problems = []
        if self.limit is not None and self.limit <= 0:
            problems.append(f"limit={self.limit}: choose a number above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"num_fewshot={self.num_fewshot}: choose 0 or more")
        batch_size = self.eval_batch_size
        if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
            problems.append(f"eval_batch_size={batch_size}: choose 1 or more, or auto")
        unknown = set(self.baseline_names) - set(BASELINES)
        if unknown:
            problems.append(f"baselines={self.baselines}: choose from {', '.join(BASELINES)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def baseline_names(self) -> list[str]:
        return split_names(self.baselines or "")

    @property
    def batch_size(self) -> int | str:
        return self.eval_batch_size if self.eval_batch_size == "auto" else int(self.eval_batch_size)


class Member(NamedTuple):
    """One model of a sweep."""

    series: str
    """`family`, or the name of a baseline."""
    num_layers_to_patch: int
    recipe: Recipe

    @property
    def file_name(self) -> str:
        return f"{self.series}_k{self.num_layers_to_patch}.json"


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def members_of(pair: Pair, sizes: list[int], baselines: list[str]) -> list[Member]:
    """The models of a sweep. At k = max naive pruning is the teacher, which is there already."""
    members = [Member("family", k, pair.recipe(k)) for k in sizes]
    if "naive" in baselines:
        members += [
            Member("naive", k, pair.naive_recipe(k))
            for k in sizes
            if k < pair.layer_map.max_layers_to_patch
        ]
    return members


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            EvaluationArguments, prog="evaluate.evaluate", description=__doc__
        )
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        check_writable(arguments.save_directory)
        pair = Pair.from_pretrained(arguments)
        sizes = parse_sizes(arguments.num_layers_to_patch, pair.layer_map.max_layers_to_patch)
        members = members_of(pair, sizes, arguments.baseline_names)
        device = usable_device(arguments.device)
        tokenizer = pair.tokenizer
        tasks = load_tasks(
            split_names(arguments.tasks), arguments.include_path, arguments.trust_remote_code
        )
    needed = set().union(*(member.recipe.parents for member in members))
    parents = pair.load(needed, pair.dtype(arguments.dtype), device)
    arguments.save_directory.mkdir(parents=True, exist_ok=True)
    made_by = {"arguments": dataclasses.asdict(arguments), "environment": environment()}

    results = []
    with tqdm(members, desc="models", unit="model") as progress:
        for member in progress:
            progress.set_postfix_str(member.file_name.removesuffix(".json"))
            model = assemble(member.recipe, **parents)
            result = {
                "series": member.series,
                "num_layers_to_patch": member.num_layers_to_patch,
                "max_layers_to_patch": pair.layer_map.max_layers_to_patch,
                "order": pair.order,
                "depth": member.recipe.depth,
                "parameters": count_parameters(model.config, arguments.trust_remote_code)._asdict(),
                "recipe": member.recipe.to_dict(),
                **run_tasks(model, tokenizer, tasks, arguments),
                **made_by,
            }
            write_json(arguments.save_directory / member.file_name, result)
            results.append(result)
    print(write_report(results, arguments.save_directory))
    print(f"plot: {arguments.save_directory / 'summary.png'}")


def run_tasks(model, tokenizer, tasks: list, arguments: EvaluationArguments) -> dict[str, Any]:
    """What lm-eval finds for one model: results, and the versions and settings of the tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model_of_harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    limit = arguments.limit
    found = simple_evaluate(
        model_of_harness,
        tasks=tasks,
        num_fewshot=arguments.num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        log_samples=False,
    )
    kept = ("results", "groups", "higher_is_better", "n-shot", "n-samples", "versions", "configs")
    return {name: found[name] for name in kept if name in found}


def usable_device(name: str | None) -> torch.device:
    """The named device, by default the accelerator where there is one. Raises ValueError if it is
    not there.
    """
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch raises either for a device it has not got
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here: {reason}") from error


if __name__ == "__main__":
    main()
