"""Report on the results of one or several sweeps: tables (Markdown, CSV, JSON) and plots (PNG,
SVG).

    python -m evaluate.report DIR... --save_directory OUT

reads the results in each DIR. Shards of one sweep are put together. Several sweeps are compared,
each named after its folder. Scores that
were measured under other conditions than the others of their task are marked.
"""

import dataclasses
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evaluate.documents import read_documents
from evaluate.reporting.comparison import Comparison
from evaluate.reporting.exports import csv_table, json_summary
from evaluate.reporting.tables import markdown_report, page_name
from evaluate.result import Result, read_results
from evaluate.shards import merged, shards_of
from patching.cli.command_line import CommandLineParser, user_errors
from patching.files.outputs import check_writable, write_bytes, write_json, write_text


def write_report(
    results: Sequence[Result], folder: Path, failures: Mapping[str, str] | None = None
) -> str:
    """Write summary.md, .csv, .json, .png and .svg; return the Markdown.

    Further pages of plots are summary_2.png and so on. `failures` are tasks that could not be
    evaluated, and why.
    """
    from evaluate.reporting.plot import plot  # matplotlib, which `--help` does not need

    results = sorted(results, key=_position)
    comparison = Comparison.of(results)
    pages = plot(comparison)
    report = markdown_report(comparison, failures or {}, len(pages))
    folder.mkdir(parents=True, exist_ok=True)
    for page, figure in enumerate(pages):
        for suffix in ("png", "svg"):
            picture = io.BytesIO()
            figure.savefig(picture, format=suffix, dpi=150)
            write_bytes(folder / f"{page_name(page)}.{suffix}", picture.getvalue())
    write_text(folder / "summary.csv", csv_table(results))
    write_json(folder / "summary.json", json_summary(comparison, failures or {}))
    write_text(folder / "summary.md", report)
    return report


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


def read_sweeps(folders: Sequence[Path]) -> Iterator[Result]:
    """The results in some folders. Shards of one sweep are put together. If there are several
    sweeps, each result is given its sweep's name.

    Raises ValueError for a folder without results.
    """
    found: dict[Path, dict[str, Result]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
        found[folder] = read_results(folder)
        if not found[folder]:
            raise ValueError(
                f"{folder}: there are no results in it, name a --save_directory of "
                "evaluate.evaluate"
            )
        for name, result in found[folder].items():
            result.documents = read_documents(folder, name)
    sweeps = shards_of(found)
    names = short_names([str(sweep.folders[0].resolve()) for sweep in sweeps])
    for sweep_name, sweep in zip(names, sweeps):
        if sweep.missing and len(folders) > 1:
            warnings.warn(
                f"{sweep.folders[0]}: shards {', '.join(sweep.missing)} of this sweep are missing",
                stacklevel=2,
            )
        by_name: dict[str, list[Result]] = {}
        for folder in sweep.folders:
            for name, result in found[folder].items():
                by_name.setdefault(name, []).append(result)
        for name in sorted(by_name):
            yield dataclasses.replace(
                merged(by_name[name]), sweep=sweep_name if len(sweeps) > 1 else None
            )


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
        check_writable(folder)
        results = list(read_sweeps(list(dict.fromkeys(arguments.directories))))
    print(write_report(results, folder))
    print(f"report: {folder / 'summary.md'}")


if __name__ == "__main__":
    main()
