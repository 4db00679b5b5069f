"""What the sweeps say: scores by number of layers and seed, and how each claim fares."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from evaluate.result import Result, read_results
from examples.stdlib.chat_data import NEW_SUMS, TASK_NAMES
from examples.studies.chats.students import SWEEPS, TEACHERS, TEXT_TASK
from examples.studies.claims import findings as shared
from examples.studies.claims.findings import Claim, Lines, between
from examples.studies.claims.students import missing_sweeps

LABELS = {
    "two_phases": "text, then chats",
    "text": "text alone",
    "chats": "chats alone",
    "base_in_chat": "base student",
    "delta_to_chat": "weight delta",
    "base_in_apart": "base student, teacher apart",
    "delta_to_apart": "weight delta, teacher apart",
}
"""Names of the sweeps in tables."""


def exact_match(result: Result) -> float:
    """The share of chat questions that are answered exactly, as the mean over the tasks."""
    return mean(result.results[task]["exact_match,strip"] for task in TASK_NAMES)


def bits_per_byte(result: Result) -> float:
    return result.results[TEXT_TASK]["bits_per_byte,none"]


def new_sums(result: Result) -> float:
    """The share of right answers to sums that are in no chat."""
    return result.results[NEW_SUMS]["exact_match,strip"]


def failed_answers(result: Result) -> float:
    """The share of answers to chat questions that were cut off or loop."""
    of_tasks = [result.generation_failures[task] for task in TASK_NAMES]
    return sum(of["failed"] for of in of_tasks) / sum(of["answers"] for of in of_tasks)


SCORES: dict[str, Callable[[Result], float]] = {
    "exact_match": exact_match,
    "bits_per_byte": bits_per_byte,
    "failed_answers": failed_answers,
    "new_sums": new_sums,
}
CLAIMS = (
    ("Text, then chats, beats text alone on chats", "yes", "exact_match", "two_phases", "text"),
    ("Text, then chats, beats chats alone on text", "yes", "bits_per_byte", "two_phases", "chats"),
    (
        "A weight delta beats the base student itself, on chats",
        "yes",
        "exact_match",
        "delta_to_chat",
        "base_in_chat",
    ),
    (
        "The same for a teacher that is apart, where the cosine says no",
        "no",
        "exact_match",
        "delta_to_apart",
        "base_in_apart",
    ),
)
"""Text, what is expected, the score, and the sweeps of which the first is said to be better."""


def read_scores(folder: Path, seeds: Sequence[int]) -> dict[str, Lines]:
    """Scores by name, sweep and number of layers, one for each seed, of sweeps that all seeds have
    finished.
    """
    scores: dict[str, Lines] = {name: {} for name in SCORES}
    for sweep in SWEEPS:
        if missing_sweeps(folder, seeds, [sweep]):
            continue
        for seed in seeds:
            results = read_results(folder / f"seed_{seed}" / "results" / sweep).values()
            for result in sorted(results, key=lambda result: result.depth):
                for name, score in SCORES.items():
                    if name in ("bits_per_byte", "new_sums") and not SWEEPS[sweep].has_text:
                        continue
                    line = scores[name].setdefault(sweep, {})
                    line.setdefault(result.depth, []).append(score(result))
    return scores


def claims_of(scores: dict[str, Lines]) -> list[Claim]:
    """The claims about sweeps that are there, with their gains at each size in between."""
    claims = []
    for text, expected, score, better, worse in CLAIMS:
        lines = scores[score]
        if {better, worse} <= lines.keys():
            is_loss = score == "bits_per_byte"
            pair = (lines[better], lines[worse]) if is_loss else (lines[worse], lines[better])
            claims.append(Claim(text, expected, between(*pair)))
    return claims


claims_table = partial(shared.claims_table, header="| claim | expected | here | gain, by layers |")
scores_table = partial(shared.scores_table, labels=LABELS, first_column="students")


def cosines(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """The cosine between the shipped teacher and each chat teacher, by student layer."""
    return {
        teacher: json.loads((path / "weight_delta.json").read_text())["cosine_by_layer"]
        for teacher in TEACHERS
        if (path := folder / f"seed_{seed}" / f"delta_to_{teacher}").is_dir()
    }


def cosines_table(found: dict[str, dict[str, float]]) -> str:
    layers = sorted(set().union(*found.values()), key=int)
    rows = [["teacher", *(f"layer {i}" for i in layers)], ["---", *["---:"] * len(layers)]]
    rows += [[name, *(f"{of[i]:.3f}" for i in layers)] for name, of in found.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def teacher_records(folder: Path) -> dict[str, dict[str, Any]]:
    """How each chat teacher was trained, without its log."""
    records = {}
    for name in TEACHERS:
        record = json.loads((folder / name / "training.json").read_text())
        values = {key: record["arguments"][key] for key in ("steps", "seed", "muon_lr", "adam_lr")}
        records[name] = values | {key: record[key] for key in ("trained_tokens", "seconds")}
    return records
