"""The report's tables in Markdown. Tasks are rows, and sizes are columns, a few in each table."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from evaluate.answers import LEAST_CHARACTERS, LEAST_REPEATS
from evaluate.reporting.comparison import DIP_MARKS, Comparison
from evaluate.reporting.conditions import (
    NOT_KNOWN,
    PACKAGES,
    documents_text,
    few_shot_text,
    usual,
)
from evaluate.reporting.dips import LEVEL, Dip
from evaluate.reporting.scores import Score, averages, tasks_of_averages
from evaluate.result import Result
from patching.cli.units import bytes_text, count_text

MODELS_PER_TABLE = 9
FAILURES_CAPTION = (
    "Generated answers that were cut off at the most tokens they may have, before they ended, or "
    f"that end with the same text at least {LEAST_REPEATS} times in {LEAST_CHARACTERS} characters "
    "or more. They count as failed here, whatever a task's own metric makes of them."
)


def markdown_report(report: Comparison, failures: Mapping[str, str], num_pages: int) -> str:
    """The whole report in Markdown."""
    pictures = [f"![Scores against parameters]({page_name(i)}.png)" for i in range(num_pages)]
    parts = ["# Scores by size", *pictures]
    parts += ["## Averages", _averages_caption(report), _averages_table(report)]
    parts += ["## Scores", _conditions_line(report), *_score_tables(report), _notes(report)]
    if failed := _failures_table(report.results):
        parts += ["## Answers that failed", FAILURES_CAPTION, failed]
    parts += ["## Dips", _dip_list(report.dips)]
    parts += ["## Sizes and costs", _costs_table(report.results), _how_measured(report.results)]
    if failures:
        lines = [f"- {task}: {reason}" for task, reason in failures.items()]
        parts += ["## Not evaluated", "\n".join(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def page_name(page: int) -> str:
    """The name of a page of plots, without suffix."""
    return f"summary_{page + 1}" if page else "summary"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A table whose first columns are text, and the others numbers."""
    rule = ["---"] * num_left + ["---:"] * (len(header) - num_left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _arrow(score: Score) -> str:
    return "↑" if score.higher_is_better else "↓"


def _score_text(score: Score | None) -> str:
    if score is None:
        return "-"
    digits = _digits(score.value)
    return f"{score.value:{digits}}" + (
        "" if score.stderr is None else f" ± {score.stderr:{digits}}"
    )


def _digits(value: float) -> str:
    """The format of a score, a difference or an error. Perplexities may have hundreds of digits."""
    return ".4f" if abs(value) < 1e4 else ".3e"


def _score_tables(report: Comparison) -> list[str]:
    """Tables of each series' main scores, with standard errors: one row per task, and the
    conditions that hold for the task.
    """
    tables = []
    numbered = list(enumerate(report.results))
    by_series = sorted(numbered, key=lambda item: _series_position(item[1]))
    for (_, title), members in groupby(by_series, key=lambda item: _series_position(item[1])):
        columns = list(members)
        tables.append(f"### {title}")
        for start in range(0, len(columns), MODELS_PER_TABLE):
            tables.append(_score_table(report, columns[start : start + MODELS_PER_TABLE]))
    return tables


def _series_position(result: Result) -> tuple:
    """Sorts by sweep and series. Compared models share tables."""
    if result.series.startswith("compare_"):
        title = f"{result.sweep}: other models" if result.sweep else "other models"
        return (result.sweep or "", True), title
    return (result.sweep or "", False, result.series_position), result.series_label


def _score_table(report: Comparison, columns: Sequence[tuple[int, Result]]) -> str:
    header = ["task", "metric", "few-shot", "documents", "version"]
    header += [result.label for _, result in columns]
    blank = [""] * 4
    rows = [
        ["layers", *blank, *(str(result.depth) for _, result in columns)],
        ["parameters", *blank, *(count_text(r.parameters.both_counted) for _, r in columns)],
    ]
    for task in dict.fromkeys(task for i, _ in columns for task in report.shown[i]):
        first = next(i for i, _ in columns if task in report.shown[i])
        score, of_task = report.shown[first][task], report.usual[task]
        cells = [
            _score_text(report.shown[i][task]) + report.dip_mark(i, task) + report.mark(i, task)
            if task in report.shown[i]
            else "-"
            for i, _ in columns
        ]
        conditions = [of_task[name] for name in ("few-shot", "number of documents", "task version")]
        rows.append([task, f"{score.metric} {_arrow(score)}", *conditions, *cells])
    return _table(header, rows, num_left=5)


def _conditions_line(report: Comparison) -> str:
    """What holds for all scores, or for most of them."""
    conditions = [c for of_model in report.conditions for c in of_model.values()]
    if not conditions:
        return "No task has a score."
    of_all = usual(conditions)
    parts = [f"limit {of_all.get('limit', NOT_KNOWN)}"]
    parts += [f"{name} {of_all.get(name, NOT_KNOWN)}" for name in ("dtype", "seed", *PACKAGES)]
    return f"Measured with {', '.join(parts)}."


def _notes(report: Comparison) -> str:
    """What the marks in the tables mean, as far as there are any, and where conditions differ."""
    lines = []
    if any(dip.is_significant is not None for dip in report.dips) or report.dips:
        lines.append("▼ and ▽ mark dips, see below.")
    scores = [(i, task) for i, shown in enumerate(report.shown) for task in shown]
    if any(report.results[i].is_unverified(task) for i, task in scores):
        lines.append(
            "‡ marks unverified scores: an earlier version stored them, and nothing says which "
            "tasks, prompts and documents they belong to. A sweep computes them again."
        )
    others: dict[str, list[str]] = {}
    for i, task in scores:
        if found := report.other_conditions(i, task):
            others.setdefault(f"{task}: {found}", []).append(report.results[i].label)
    if others:
        lines.append(
            "† marks scores that cannot be compared with the others of their task, because they "
            "were measured under other conditions:\n"
        )
        lines += [f"- {', '.join(labels)} on {what}" for what, labels in others.items()]
    return "\n".join(lines)


def _averages_caption(report: Comparison) -> str:
    sentences = ["Each task counts once, and only metrics of one scale are averaged."]
    for name, tasks in tasks_of_averages(report.results).items():
        counts = {report.usual[task]["number of documents"] for task in tasks}
        shots = sorted({report.usual[task]["few-shot"] for task in tasks})
        documents = counts.pop() if len(counts) == 1 else "see each task's"
        sentences.append(
            f"{name}: {', '.join(tasks)} (few-shot {' and '.join(shots)}, documents {documents})."
        )
    return " ".join([*sentences, _conditions_line(report)])


def _averages_table(report: Comparison) -> str:
    columns, tasks = averages(report.results), tasks_of_averages(report.results)
    header = ["model", "parameters"]
    for name, scores in columns.items():
        score = next((score for score in scores if score is not None), None)
        header.append(f"{name} {_arrow(score)}" if score else name)
    rows = []
    for i, result in enumerate(report.results):
        cells = [
            _score_text(scores[i]) + (report.marks_of(tasks[name], i) if scores[i] else "")
            for name, scores in columns.items()
        ]
        rows.append([result.label, count_text(result.parameters.both_counted), *cells])
    return _table(header, rows)


def _failures_table(results: Sequence[Result]) -> str:
    """Shares of failed answers per task and model, empty if nothing was generated."""
    header = ["task", "model", "parameters", "answers", "cut off", "looping", "failed"]
    rows = []
    for task in dict.fromkeys(task for result in results for task in result.generation_failures):
        for result in results:
            if (counts := result.generation_failures.get(task)) is None:
                continue
            size = count_text(result.parameters.both_counted)
            shares = [
                f"{counts[name] / counts['answers']:.1%}" for name in ("cut", "looping", "failed")
            ]
            rows.append([task, result.label, size, str(counts["answers"]), *shares])
    return _table(header, rows, num_left=2) if rows else ""


def _dip_list(found: Sequence[Dip]) -> str:
    if not found:
        return "No size is worse than the next smaller one on any task."
    text = (
        "Sizes that are worse than the next smaller one. Errors and p come from the differences on "
        "single documents, which all sizes have in common. p is one-sided, and corrected for all "
        f"comparisons of neighboring sizes (Holm). ▼ marks dips with corrected p below {LEVEL} and "
        "those that cannot be tested, ▽ all others."
    )
    header = ["model", "task", "documents", "few-shot", "score", "at next smaller size"]
    header += ["difference", "p", "corrected p"]
    return f"{text}\n\n{_table(header, [_dip_cells(dip) for dip in found], num_left=2)}"


def _dip_cells(dip: Dip) -> list[str]:
    stderr, task = dip.difference.stderr, dip.score.task
    error = "" if stderr is None else f" ± {stderr:{_digits(stderr)}}"
    note = "" if dip.difference.is_paired else " (not paired)"
    p_values = (dip.difference.p, dip.corrected_p)
    return [
        f"{dip.result.label}{DIP_MARKS[dip.is_significant]}",
        task,
        documents_text(dip.result, task),
        few_shot_text(dip.result, task),
        f"{dip.score.value:{_digits(dip.score.value)}}",
        f"{dip.before.value:{_digits(dip.before.value)}}",
        f"{dip.difference.value:+{_digits(dip.difference.value)}}{error}{note}",
        *(NOT_KNOWN if p is None else f"{p:.2g}" for p in p_values),
    ]


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
        sizes = [count_text(n) for n in (result.parameters.both_counted, result.parameters.stored)]
        rows.append([result.label, str(result.depth), *sizes, *cells])
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
            f"after the final norm, averaged over the tokens of {' and of '.join(sorted(texts))}."
        )
    costs = [result.cost for result in results if result.cost]
    for num_rows, num_tokens in sorted({(cost.rows, cost.tokens_per_row) for cost in costs}):
        places = {f" in {cost.dtype} on {cost.device}" for cost in costs if cost.device}
        sentences.append(
            f"Speed and memory are measured on forward passes of {num_rows} rows of {num_tokens} "
            f"tokens{' and'.join(sorted(places))}. Memory is that of the weights plus the peak of "
            "all other tensors."
        )
    return " ".join(sentences)
