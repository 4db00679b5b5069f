"""What the sweeps say about each claim.

A claim is a number of gains, in bits per byte and by number of layers: each how much better one
model is than another, for every seed. It is answered with yes if all of its gains are above 0 in
all seeds, with no if none is, and with partly otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from evaluate.baselines import BASELINES
from evaluate.result import read_results
from examples.studies.claims.students import SWEEPS, TASKS, missing_sweeps

BITS = (TASKS[0], "bits_per_byte,none")
ACCURACY = (TASKS[1], "acc_norm,none")
NUM_LAYERS = 12
"""Layers of the demo's teacher."""

Line = dict[int, list[float]]
"""Scores of the models of one kind by number of layers, one for each seed, or a single one if no
seed changes them."""
Lines = dict[str, Line]

LABELS = {
    "all_terms": "interpolated",
    "all_terms naive": "naive pruning",
    "all_terms block_influence": "pruned by block influence",
    "all_terms laco": "LaCo",
    "first": "order `first`",
    "klpatch": "order KLPatch",
    "random": "student from random weights",
    "ce": "CE",
    "ce_kl": "CE + KL",
    "cosine": "cosine",
    "every_3": "every 3rd layer kept",
    "every_4": "every 4th layer kept",
    "every_5": "every 5th layer kept",
    "own": "distilled on their own",
}
"""Names of lines in tables. The first keeps every 2nd layer, has all three terms and is patched
from the last layer on."""


class Claim(NamedTuple):
    text: str
    in_the_paper: str
    gains: Line
    """By number of layers: the gain of each seed."""

    @property
    def verdict(self) -> str:
        holds = [min(of_depth) > 0 for of_depth in self.gains.values()]
        fails = [max(of_depth) <= 0 for of_depth in self.gains.values()]
        return "yes" if all(holds) else "no" if all(fails) else "partly"


def read_lines(folder: Path, seeds: Sequence[int], score: tuple[str, str]) -> Lines:
    """The scores of the sweeps that all seeds have. The name of a line is that of its sweep,
    followed by that of a baseline.
    """
    task, key = score
    lines: Lines = {}
    for sweep in SWEEPS:
        if missing_sweeps(folder, seeds, [sweep]):
            continue
        for seed in seeds:
            results = read_results(folder / f"seed_{seed}" / "results" / sweep)
            for result in sorted(results.values(), key=lambda result: result.depth):
                if sweep == "own" and result.series == "family":
                    continue  # to be had from its own sweep
                is_baseline = result.series in BASELINES
                line = lines.setdefault(f"{sweep} {result.series}" if is_baseline else sweep, {})
                line.setdefault(result.depth, []).append(result.results[task][key])
    return lines


def between(line: Line, other: Line) -> Line:
    """How many bits per byte less the first line's sizes take than the other's, where both have
    one of that depth.
    """
    return {
        depth: differences(other[depth], line[depth]) for depth in sizes(line) if depth in other
    }


def over_student(line: Line) -> Line:
    """How many bits per byte less a line's sizes take than its student."""
    return {depth: differences(line[min(line)], line[depth]) for depth in sizes(line)}


def under_student(line: Line) -> Line:
    """How many bits per byte more a line's sizes take than its student."""
    return {d: [-gain for gain in gains] for d, gains in over_student(line).items()}


def sizes(line: Line) -> list[int]:
    """The numbers of layers between the student's and the teacher's."""
    return [depth for depth in sorted(line) if min(line) < depth < NUM_LAYERS]


def differences(worse: Sequence[float], better: Sequence[float]) -> list[float]:
    """One for each seed. A single score is that of all seeds."""
    num_seeds = max(len(worse), len(better))
    worse, better = (list(of) * (num_seeds if len(of) == 1 else 1) for of in (worse, better))
    return [a - b for a, b in zip(worse, better, strict=True)]


def with_error(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the standard deviation over seeds if there are several."""
    error = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


CLAIMS: tuple[tuple[str, str, Callable[..., Line], tuple[str, ...]], ...] = (
    (
        "Interpolated sizes beat naive pruning",
        "yes",
        between,
        ("all_terms", "all_terms naive"),
    ),
    (
        "Interpolated sizes beat ShortGPT (block influence)",
        "yes",
        between,
        ("all_terms", "all_terms block_influence"),
    ),
    ("Interpolated sizes beat LaCo", "yes", between, ("all_terms", "all_terms laco")),
    (
        "A student from random weights does not interpolate: its sizes are worse than itself",
        "yes",
        under_student,
        ("random",),
    ),
    ("Cross entropy alone: sizes beat the student", "yes", over_student, ("ce",)),
    ("All three terms beat cross entropy alone", "yes", between, ("all_terms", "ce")),
    ("All three terms beat CE + KL", "yes", between, ("all_terms", "ce_kl")),
    ("All three terms beat the cosine alone", "hardly", between, ("all_terms", "cosine")),
    ("The cosine alone beats CE + KL", "yes", between, ("cosine", "ce_kl")),
    ("Every 2nd layer kept: sizes beat the student", "yes", over_student, ("all_terms",)),
    ("Every 3rd layer kept: sizes beat the student", "yes", over_student, ("every_3",)),
    ("Every 4th layer kept: sizes beat the student", "no", over_student, ("every_4",)),
    ("Every 5th layer kept: sizes beat the student", "no", over_student, ("every_5",)),
    (
        "Interpolated sizes beat models of their size distilled on their own",
        "larger ones do",
        between,
        ("all_terms", "own"),
    ),
    (
        "Patching from the last layer beats patching from the first",
        "for a Qwen",
        between,
        ("all_terms", "first"),
    ),
    ("KLPatch beats patching from the last layer", "yes", between, ("klpatch", "all_terms")),
    ("KLPatch beats patching from the first layer", "yes", between, ("klpatch", "first")),
)
"""The claims of arXiv 2510.05064, and that of arXiv 2607.08170 about KLPatch: the text, what the
paper says, and the gain between which lines is to be above 0."""


def claims_of(lines: Lines) -> list[Claim]:
    """The claims about lines that are there."""
    return [
        Claim(text, in_the_paper, gain(*(lines[name] for name in names)))
        for text, in_the_paper, gain, names in CLAIMS
        if lines.keys() >= {*names}
    ]


def claims_table(
    claims: Sequence[Claim],
    header: str = "| claim | in the paper | here | gain in bits per byte, by layers |",
) -> str:
    """One row for each claim: the answers, and the gain at each number of layers."""
    rows = [header, "| --- | --- | --- | --- |"]
    for claim in claims:
        gains = ", ".join(f"{depth}: {with_error(of)}" for depth, of in claim.gains.items())
        rows.append(f"| {claim.text} | {claim.in_the_paper} | {claim.verdict} | {gains} |")
    return "\n".join(rows)


def scores_table(
    lines: Lines,
    labels: Mapping[str, str] = LABELS,
    first_column: str = "models",
    digits: int = 3,
) -> str:
    """One row for each line that has a label, one column for each number of layers."""
    depths = sorted(set().union(*lines.values()))
    rows = [[first_column, *map(str, depths)], ["---", *["---:"] * len(depths)]]
    for name in (name for name in labels if name in lines):
        line = lines[name]
        scores = (with_error(line[depth], digits) if depth in line else "" for depth in depths)
        rows.append([labels[name], *scores])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
