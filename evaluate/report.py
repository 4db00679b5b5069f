"""Report on the results of one or several sweeps: tables (Markdown, CSV, JSON) and plots (PNG,
SVG).

    python -m evaluate.report DIR... --save_directory OUT

reads the results in each DIR. Shards of one sweep are put together. Several sweeps are compared,
each named after its folder. Scores that were measured under other conditions than the others of
their task are marked. Tasks that a sweep could not evaluate are listed.
"""

import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluate.documents import read_documents
from evaluate.failures import read_failures
from evaluate.reporting.comparison import Comparison
from evaluate.reporting.exports import csv_table, json_summary
from evaluate.reporting.tables import markdown_report, page_name
from evaluate.result import Result, read_results
from evaluate.shards import merged, shards_of
from patching.cli.command_line import CommandLineParser, run_command, user_errors
from patching.files.outputs import (
    check_writable,
    finite_or_none,
    json_text,
    printable,
    write_together,
)

FILE_NAMES = tuple(f"summary.{suffix}" for suffix in ("png", "svg", "csv", "json", "md"))
"""The files of a report with one page of plots."""


def report_files(
    results: Sequence[Result], failures: Mapping[str, str] | None = None
) -> dict[str, bytes]:
    """The contents of summary.png, .svg, .csv, .json and .md, by name.

    Further pages of plots are summary_2.png and so on. `failures` are tasks that could not be
    evaluated, and why.
    """
    from matplotlib import rc_context  # which `--help` does not need

    from evaluate.reporting.plot import plot

    results, failures = sorted(results, key=_position), printable(failures or {})
    comparison = Comparison.of(results)
    pages = plot(comparison)
    files = {}
    for page, figure in enumerate(pages):
        for suffix in ("png", "svg"):
            picture = io.BytesIO()
            # Without a date and random ids the same results give the same file.
            undated = {"metadata": {"Date": None}} if suffix == "svg" else {}
            with rc_context({"svg.hashsalt": "boomerang"}):
                figure.savefig(picture, format=suffix, dpi=150, **undated)
            files[f"{page_name(page)}.{suffix}"] = picture.getvalue()
    summary = finite_or_none(json_summary(comparison, failures))
    texts = {
        "summary.csv": csv_table(results),
        "summary.json": json_text(summary),
        "summary.md": markdown_report(comparison, failures, len(pages)),
    }
    return files | {name: text.encode() for name, text in texts.items()}


def _position(result: Result) -> tuple:
    """Sorts by sweep and size, the family first at each size, compared models last."""
    k = result.num_layers_to_patch
    return (result.sweep or "", k is None, k or 0, result.series_position, result.series)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell them apart."""
    parts = [Path(name).parts for name in names]
    for length in range(1, max(map(len, parts), default=0) + 1):
        short = ["_".join(of_name[-length:]).strip("/") for of_name in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


class Sweeps(NamedTuple):
    results: list[Result]
    failures: dict[str, str]
    """Tasks that could not be evaluated, and why."""


def read_sweeps(folders: Sequence[Path]) -> Sweeps:
    """What is in some folders. Shards of one sweep are put together. If there are several sweeps,
    each result and each failure is given its sweep's name.

    Raises ValueError for a folder that does not exist, and if none has results.
    """
    found, failed = read_folders(folders)
    sweeps = shards_of(found)
    names = short_names([printable(str(sweep.folders[0].resolve())) for sweep in sweeps])
    named: list[Result] = []
    failures: dict[str, str] = {}
    for sweep_name, sweep in zip(names, sweeps):
        if sweep.missing and len(folders) > 1:
            warnings.warn(
                f"{sweep.folders[0]}: shards {sweep.missing} of this sweep are missing",
                stacklevel=2,
            )
        by_name: dict[str, list[Result]] = {}
        for folder in sweep.folders:
            for name, result in found[folder].items():
                by_name.setdefault(name, []).append(result)
        in_report = sweep_name if len(sweeps) > 1 else None
        named += [
            dataclasses.replace(merged(by_name[name]), sweep=in_report) for name in sorted(by_name)
        ]
        for folder in sweep.folders:
            add_failures(failures, failed.pop(folder), in_report)
    for folder, of_folder in failed.items():  # shards in which every task failed
        add_failures(failures, of_folder, folder.name if len(sweeps) > 1 else None)
    return Sweeps(named, failures)


def read_folders(
    folders: Sequence[Path],
) -> tuple[dict[Path, dict[str, Result]], dict[Path, dict[str, str]]]:
    """The results and the failures in folders. A folder without results is not among the first, and
    one without failures either is left out with a warning if others have any.
    """
    found: dict[Path, dict[str, Result]] = {}
    failed: dict[Path, dict[str, str]] = {}
    without = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
        results, failures = read_results(folder), read_failures(folder)
        if not results and not failures:
            without.append(
                f"{folder}: there are no results in it, name a --save_directory of "
                "evaluate.evaluate"
            )
            continue
        failed[folder] = failures
        if results:
            found[folder] = {
                name: Result.from_dict(printable(result.to_dict()))
                for name, result in results.items()
            }
        for name, result in found.get(folder, {}).items():
            result.documents = read_documents(folder, name)
    if without and not failed:
        raise ValueError(without[0])
    for problem in without:  # such as a shard that has just begun
        warnings.warn(problem, stacklevel=3)
    if not found:
        tasks = sorted({task for of_folder in failed.values() for task in of_folder})
        raise ValueError(
            f"{', '.join(map(str, folders))}: no results, and {', '.join(tasks)} failed: see why "
            "with evaluate.evaluate"
        )
    return found, failed


def add_failures(failures: dict[str, str], more: Mapping[str, str], sweep: str | None) -> None:
    """Add the failures of a sweep or of a further shard of it, in place."""
    for task, reason in more.items():
        failures.setdefault(f"{sweep}: {task}" if sweep else task, reason)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            prog="evaluate.report",
            usage="%(prog)s DIR... [--save_directory OUT]",
            description=__doc__,
        )
        parser.add_argument("directories", nargs="+", type=Path, help="folders with results")
        parser.add_argument(
            "--save_directory",
            type=Path,
            help="folder for the report (by default the folder with the results)",
        )
        arguments = parser.parse_args(argv)
        folder = arguments.save_directory
        if folder is None:
            if len(arguments.directories) > 1:
                raise ValueError(
                    "several sweeps: name a folder for the report with --save_directory"
                )
            (folder,) = arguments.directories
        check_writable(folder, *FILE_NAMES)
        results, failures = read_sweeps(list(dict.fromkeys(arguments.directories)))
    files = report_files(results, failures)
    with user_errors():
        write_together(folder, files)
    print(files["summary.md"].decode())
    print(f"report: {folder / 'summary.md'}")


if __name__ == "__main__":
    run_command(main)
