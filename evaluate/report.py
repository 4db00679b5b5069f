"""Report on the results of one or several sweeps: tables (Markdown, CSV, JSON) and a plot (PNG,
SVG).

    python -m evaluate.report DIR... --save_directory OUT

reads the results in each DIR. Several sweeps are compared, each named after its folder.
"""

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate.result import SERIES_LABELS, Result, read_results
from evaluate.scores import Dip, Score, averages, dips, main_scores, scores_of
from patching.cli.command_line import CommandLineParser, user_errors
from patching.cli.units import bytes_text, count_text
from patching.files.outputs import check_writable, write_json, write_text

DIP_MARKS = {True: " ▼", False: " ▽", None: " ▼"}
"""Marks after a score in the table, by whether the dip is significant. A dip in a score without a
standard error, such as lm-eval's perplexities, counts as significant."""
SERIES_ORDER = (*SERIES_LABELS,)
"""Order of rows at one size. Compared models come last."""


def write_report(
    results: Sequence[Result], folder: Path, failures: Mapping[str, str] | None = None
) -> str:
    """Write summary.md, .csv, .json, .png and .svg; return the Markdown.

    `failures` are tasks that could not be evaluated, and why.
    """
    from evaluate.plot import plot  # matplotlib, which `--help` does not need

    results = sorted(results, key=_position)
    report = markdown_report(results, failures or {})
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot(results)
    for suffix in ("png", "svg"):
        staged = folder / f".summary.{suffix}"
        figure.savefig(staged, format=suffix, dpi=150)
        staged.replace(folder / f"summary.{suffix}")
    write_text(folder / "summary.csv", csv_table(results))
    write_json(folder / "summary.json", json_summary(results, failures or {}))
    write_text(folder / "summary.md", report)
    return report


def _position(result: Result) -> tuple:
    """Sorts by sweep and size, the family first at each size, compared models last."""
    k, series = result.num_layers_to_patch, result.series
    rank = SERIES_ORDER.index(series) if series in SERIES_ORDER else len(SERIES_ORDER)
    return (result.sweep or "", k is None, k or 0, rank, series)


def markdown_report(results: Sequence[Result], failures: Mapping[str, str]) -> str:
    """The whole report, with `results` in the order of their rows."""
    parts = [
        "# Scores by size",
        "![Scores against parameters](summary.png)",
        markdown_table(results),
        _dip_list(dips(results)),
        "## Averages",
        "Each task counts once. Classification, perplexity and generation are averaged separately.",
        _averages_table(results),
        "## Sizes and costs",
        _costs_table(results),
        _how_measured(results),
    ]
    if failures:
        parts += [
            "## Not evaluated",
            "\n".join(f"- {task}: {reason}" for task, reason in failures.items()),
        ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def markdown_table(results: Sequence[Result]) -> str:
    """One row per model: layers, parameters, stored parameters, and each task's main score with its
    standard error. Dips are marked.
    """
    columns: dict[str, Score] = {}
    for result in results:
        columns |= {task: s for task, s in main_scores(result).items() if task not in columns}
    header = ["model", "layers", "parameters", "stored"] + [
        f"{task} ({score.metric} {_arrow(score)})" for task, score in columns.items()
    ]
    marks = {
        (id(dip.result), dip.score.task): DIP_MARKS[dip.is_significant] for dip in dips(results)
    }
    rows = []
    for result in results:
        shown = main_scores(result)
        cells = [
            _score_text(shown.get(task)) + marks.get((id(result), task), "") for task in columns
        ]
        rows.append([*_size_cells(result), *cells])
    return _table(header, rows)


def _arrow(score: Score) -> str:
    return "↑" if score.higher_is_better else "↓"


def _size_cells(result: Result) -> list[str]:
    return [
        result.label,
        str(result.depth),
        count_text(result.parameters.both_counted),
        count_text(result.parameters.stored),
    ]


def _score_text(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _averages_table(results: Sequence[Result]) -> str:
    columns = averages(results)
    header = ["model", "parameters"]
    for name, scores in columns.items():
        score = next((score for score in scores if score is not None), None)
        header.append(f"{name} {_arrow(score)}" if score else name)
    rows = [
        [
            result.label,
            count_text(result.parameters.both_counted),
            *(_score_text(scores[i]) for scores in columns.values()),
        ]
        for i, result in enumerate(results)
    ]
    return _table(header, rows)


def _costs_table(results: Sequence[Result]) -> str:
    header = [
        "model", "layers", "parameters", "stored", "weights", "similarity to teacher",
        "tokens per second", "memory",
    ]  # fmt: skip
    rows = []
    for result in results:
        cost, similarity = result.cost, result.similarity
        cells = [f"{similarity.to_teacher:.4f}" if similarity else "-"]
        if cost:
            memory = cost.weights_bytes + cost.peak_beyond_weights_bytes
            cells = [
                bytes_text(cost.weights_bytes),
                *cells,
                f"{cost.tokens_per_second:,.0f}",
                bytes_text(memory),
            ]
        else:
            cells = ["-", *cells, "-", "-"]
        rows.append([*_size_cells(result), *cells])
    return _table(header, rows)


def _how_measured(results: Sequence[Result]) -> str:
    """What the columns of the table of costs mean."""
    sentences = [
        "Parameters count embedding and head both. Stored parameters and weights count a tied "
        "matrix once."
    ]
    texts = {result.similarity.text for result in results if result.similarity}
    if texts:
        sentences.append(
            "Similarity is the cosine between the last hidden states of a model and its teacher, "
            f"after the final norm, averaged over the tokens of {' and of '.join(texts)}."
        )
    shapes = {(r.cost.rows, r.cost.tokens_per_row) for r in results if r.cost}
    for num_rows, num_tokens in sorted(shapes):
        devices = {result.environment["device"] for result in results if result.environment}
        dtypes = {result.settings["dtype"] for result in results if result.settings}
        sentences.append(
            f"Speed and memory are measured on forward passes of {num_rows} rows of {num_tokens} "
            f"tokens in {' and '.join(sorted(dtypes))} on {' and '.join(sorted(devices))}. Memory "
            "is that of the weights plus the peak of all other tensors."
        )
    return " ".join(sentences)


def _dip_list(found: Sequence[Dip]) -> str:
    if not found:
        return "No size is worse than the next smaller one on any task."
    lines = [
        "Sizes that are worse than the next smaller one (▽ by less than the two scores' combined "
        "standard error, ▼ by more, or with no standard error):",
        "",
    ]
    for dip in found:
        error = dip.combined_stderr
        lines.append(
            f"- {dip.result.label}, {dip.score.task}: {dip.score.value:.4f} after "
            f"{dip.before.value:.4f} at {dip.smaller.label} "
            f"({dip.score.value - dip.before.value:+.4f}; combined standard error "
            f"{'not known' if error is None else f'{error:.4f}'})"
        )
    return "\n".join(lines)


def csv_table(results: Sequence[Result]) -> str:
    """One line per model, task and metric."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [
            "sweep", "series", "model", "num_layers_to_patch", "depth", "parameters_both_counted",
            "parameters_stored", "task", "metric", "value", "stderr",
        ]
    )  # fmt: skip
    for result in results:
        for score in scores_of(result):
            writer.writerow(
                [
                    result.sweep or "",
                    result.series,
                    result.label,
                    result.num_layers_to_patch,
                    result.depth,
                    result.parameters.both_counted,
                    result.parameters.stored,
                    score.task,
                    score.metric,
                    score.value,
                    "" if score.stderr is None else score.stderr,
                ]
            )
    return text.getvalue()


def json_summary(results: Sequence[Result], failures: Mapping[str, str]) -> dict[str, Any]:
    """What the tables show, for programs."""
    columns = averages(results)
    models = []
    for i, result in enumerate(results):
        models.append(
            {
                "sweep": result.sweep,
                "model": result.label,
                "series": result.series,
                "num_layers_to_patch": result.num_layers_to_patch,
                "depth": result.depth,
                "parameters": vars(result.parameters),
                "similarity": result.similarity and vars(result.similarity),
                "cost": result.cost and vars(result.cost),
                "scores": {task: vars(score) for task, score in main_scores(result).items()},
                "averages": {
                    name: vars(scores[i]) for name, scores in columns.items() if scores[i]
                },
            }
        )
    return {
        "models": models,
        "dips": [
            {
                "model": dip.result.label,
                "num_layers_to_patch": dip.result.num_layers_to_patch,
                "task": dip.score.task,
                "value": dip.score.value,
                "at_next_smaller_size": dip.before.value,
                "combined_stderr": dip.combined_stderr,
                "is_significant": dip.is_significant,
            }
            for dip in dips(results)
        ],
        "failures": dict(failures),
    }


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell them apart."""
    parts = [Path(name).parts for name in names]
    for length in range(1, max(map(len, parts), default=0) + 1):
        short = ["_".join(of_name[-length:]).strip("/") for of_name in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def read_sweeps(folders: Sequence[Path]) -> Iterator[Result]:
    """The results in some folders. If there are several, each result is given its sweep's name.

    Raises ValueError for a folder without results.
    """
    names = short_names([str(folder.resolve()) for folder in folders])
    for name, folder in zip(names, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
        results = read_results(folder)
        if not results:
            raise ValueError(
                f"{folder}: there are no results in it, name a --save_directory of "
                "evaluate.evaluate"
            )
        for result in results.values():
            yield dataclasses.replace(result, sweep=name if len(folders) > 1 else None)


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
