"""Evaluate one size, several, or the whole family between a student and its teacher.

    python -m evaluate.evaluate --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --save_directory DIR \\
        --num_layers_to_patch all --baselines naive

measures lm-eval's tasks (--tasks), the perplexity on plain text (--dataset), or both. Masked
language models get a pseudo-perplexity.

Both models are loaded once, and all sizes share their weights. DIR receives one JSON file per model
and a report (summary.md, .csv, .json, .png, .svg). A sweep that was stopped continues when the same
command is started again. Under torchrun the ranks share the requests.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import TYPE_CHECKING

from evaluate.arguments import EvaluationArguments
from patching.cli.command_line import CommandLineParser, print_search_step, user_errors
from patching.files.outputs import check_writable, environment

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evaluate.plan import Plan


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            EvaluationArguments, prog="evaluate.evaluate", description=__doc__
        )
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        check_writable(arguments.save_directory)

    # torch, transformers and lm-eval take seconds to import, and `--help` does not need them.
    from accelerate.utils import gather_object

    from evaluate.devices import device_of_rank, is_writer, ranks_of
    from evaluate.harness import Harness
    from evaluate.plan import Plan
    from evaluate.report import write_report
    from evaluate.result import read_results
    from evaluate.series import all_series
    from evaluate.sweep import Sweep
    from evaluate.tasks import shared_texts, text_of_tasks

    with user_errors():
        plan = Plan.of(arguments, device_of_rank(arguments.device))
        if not arguments.searches_order:
            plan.check_settings()
        (tasks, failures), line = plan.tasks()
    ranks = ranks_of(plan.family.parents.device)
    if ranks is not None:
        for of_rank in gather_object([failures]):  # what one rank cannot load none evaluates
            failures |= of_rank
        tasks = {name: loaded for name, loaded in tasks.items() if name not in failures}
    if is_writer(ranks):
        if line is not None:
            print(line)
        if plan.calibration is not None:
            for warning in shared_texts(plan.calibration, tasks, arguments.limit):
                warnings.warn(warning, stacklevel=2)
    if arguments.searches_order:
        plan = with_searched_order(plan, ranks)
    sweep = Sweep(
        arguments.save_directory,
        Harness(arguments.num_fewshot, arguments.limit, arguments.log_samples),
        tasks,
        plan.calibration or text_of_tasks(tasks),
        {"arguments": dataclasses.asdict(arguments), "environment": environment()},
        is_writer=is_writer(ranks),
        failures=failures,
    )
    if tasks:
        sweep.run(all_series(plan, ranks))
    if sweep.is_writer:
        results = [*read_results(sweep.folder).values()]
        if results:
            print(write_report(results, sweep.folder, failures))
            print(f"report: {sweep.folder / 'summary.md'}")
        for task, reason in failures.items():
            print(f"failed: {task}: {reason}", file=sys.stderr)
    if ranks is not None:
        ranks.end_training()  # a process group that is still open can abort a rank as it exits
    if failures:
        sys.exit(1)


def with_searched_order(plan: Plan, ranks: Accelerator | None) -> Plan:
    """The plan with the order that `--order` asks to search. Only the first rank searches, and what
    it measures is kept in the results folder.
    """
    from accelerate.utils import broadcast_object_list

    from evaluate.devices import is_writer
    from patching.orders.findings import searched_order
    from patching.orders.measurements import MEASURED_FILE_NAME, Measurements

    arguments, order = plan.arguments, plan.family.order
    with user_errors():
        path = arguments.save_directory / MEASURED_FILE_NAME
        measure = Measurements(plan.family, plan.calibration, path)
    if is_writer(ranks):
        with user_errors((FloatingPointError,)):
            order = searched_order(measure, arguments.order, print_search_step)
    if ranks is not None:
        (order,) = broadcast_object_list([order])
    plan = plan.with_order(order)
    with user_errors():
        plan.check_settings()
    return plan


if __name__ == "__main__":
    main()
