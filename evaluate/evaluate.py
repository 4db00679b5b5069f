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
from patching.cli.command_line import CommandLineParser, print_search_step, run_command, user_errors
from patching.files.outputs import check_writable, environment, write_together

if TYPE_CHECKING:
    from evaluate.plan import Plan
    from evaluate.ranks import Ranks
    from evaluate.sweep import Sweep
    from evaluate.tasks import Tasks


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            EvaluationArguments, prog="evaluate.evaluate", description=__doc__
        )
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        check_writable(arguments.save_directory)

    # torch, transformers and lm-eval take seconds to import, and `--help` does not need them.
    from evaluate.devices import device_of_rank
    from evaluate.failures import store_failures
    from evaluate.lm_eval_files import write_files
    from evaluate.plan import Plan
    from evaluate.ranks import Ranks
    from evaluate.report import read_sweeps, report_files
    from evaluate.result import read_results
    from evaluate.series import all_series
    from evaluate.stored import check_folder
    from evaluate.tasks import shared_texts

    with user_errors():
        ranks = Ranks.connect()
        ranks.together(lambda: check_folder(arguments.save_directory), only_first=True)
        plan = ranks.together(lambda: Plan.of(arguments, device_of_rank(arguments.device)))
        if not arguments.searches_order:
            ranks.together(plan.check_settings, only_first=True)
        loaded = ranks.together(plan.tasks, only_first=True)
    if ranks.is_first:
        (tasks, failures), line = loaded
        if line is not None:
            print(line)
        if plan.calibration is not None:
            for warning in shared_texts(plan.calibration, tasks, arguments.limit):
                warnings.warn(warning, stacklevel=2)
    else:
        tasks, failures = {}, {}
    if arguments.searches_order:
        plan = with_searched_order(plan, ranks)
    sweep = sweep_of(plan, ranks, tasks, failures)
    if ranks.from_first(bool(tasks)):
        with user_errors():  # baselines measure the teacher
            series = all_series(plan, ranks)
        sweep.run(series)
    ranks.end()
    if not ranks.is_first:
        return
    folder = arguments.save_directory
    store_failures(folder, failures)
    if results := read_results(folder):
        write_files(folder, results, sweep.store.changed, arguments)
        files = report_files(read_sweeps([folder]).results, failures)
        with user_errors():
            write_together(folder, files)
        print(files["summary.md"].decode())
        print(f"report: {folder / 'summary.md'}")
    for task, reason in failures.items():
        print(f"failed: {task}: {reason}", file=sys.stderr)
    if failures:
        sys.exit(1)


def sweep_of(plan: Plan, ranks: Ranks, tasks: Tasks, failures: dict[str, str]) -> Sweep:
    """What a plan asks for, with tasks that could be loaded and those that could not."""
    from evaluate.harness import Harness
    from evaluate.result import Run
    from evaluate.shards import Shard
    from evaluate.stored import Store
    from evaluate.sweep import Sweep
    from evaluate.tasks import text_of_tasks

    arguments = plan.arguments
    made_by = (dataclasses.asdict(arguments), environment())
    # Only the first rank stores anything, and settings are hashes of all weights.
    settings = plan.settings if ranks.is_first else {}
    return Sweep(
        Harness.of(arguments),
        tasks,
        plan.calibration or text_of_tasks(tasks),
        Store(
            arguments.save_directory,
            {series: Run(of_series, *made_by) for series, of_series in settings.items()},
        ),
        ranks,
        failures,
        shard=Shard.parse(arguments.shard or "1/1"),
        write_out=arguments.write_out,
    )


def with_searched_order(plan: Plan, ranks: Ranks) -> Plan:
    """The plan with the order that `--order` asks to search. Only the first rank searches, and what
    it measures is kept in the results folder.
    """
    from patching.orders.findings import searched_order
    from patching.orders.measurements import MEASURED_FILE_NAME, Measurements

    arguments, order = plan.arguments, plan.family.order
    with user_errors():
        path = arguments.save_directory / MEASURED_FILE_NAME
        measure = ranks.together(
            lambda: Measurements(plan.family, plan.calibration, path), only_first=True
        )
    if ranks.is_first:
        with user_errors((FloatingPointError,)):
            order = searched_order(measure, arguments.order, print_search_step)
    plan = plan.with_order(ranks.from_first(order))
    with user_errors():
        ranks.together(plan.check_settings, only_first=True)
    return plan


if __name__ == "__main__":
    run_command(main, "the same command goes on with the tasks it has not finished")
