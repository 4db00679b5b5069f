"""What the scores of a pair say: means over seeds, and gains with their intervals.

A gain is how much lower a score of one model is than another's on the same texts. Its interval
(95 %) covers the choice of texts, by the paired differences of texts, and that of the seed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.studies.scale.pairs import ORDERS, STUDENTS, name_of, sets_of
from patching.matched_scale import MatchedScales
from patching.orders.scales import paired_gain

Rows = list[list[float]]
"""For each seed the sums over the tokens of each text."""
TREATMENTS = ("one", "matched", "rotated", "rotated and matched", "length", "direction")
NATS_PER_BIT = math.log(2)


def gain(before: Rows, after: Rows, units: Sequence[float]) -> dict[str, Any]:
    """Return the mean gain over seeds, half of its interval, and that of each seed."""
    by_seed = [(sum(b) - sum(a)) / sum(units) for b, a in zip(before, after, strict=True)]
    means = ([mean(of_text) for of_text in zip(*rows)] for rows in (before, after))
    _, error = paired_gain(*means, units)
    of_seeds = stdev(by_seed) ** 2 / len(by_seed) if len(by_seed) > 1 else 0.0
    return {
        "mean": mean(by_seed),
        "error": 1.96 * math.sqrt(error**2 + of_seeds),
        "by_seed": by_seed,
    }


class Scores:
    """The scores of one student of a pair, for several seeds."""

    def __init__(self, of_pair: Path, student: str, seeds: Sequence[int]) -> None:
        paths = [of_pair / f"seed_{seed}" / student for seed in seeds]
        self.found = [json.loads(Path(f"{path}.order.json").read_text()) for path in paths]
        self.scores = [json.loads(Path(f"{path}.scores.json").read_text()) for path in paths]
        self.units = {
            "kl": self.scores[0]["tokens"],
            "cross_entropy": [n * NATS_PER_BIT for n in self.scores[0]["bytes"]],
        }
        members = self.found[0]["orders"]["last"]["members"]
        self.sizes = range(1, len(members) - 1)
        self.layers = [member["layers"] for member in members]
        self.parameters = [member["parameters"]["both_counted"] for member in members]

    def sets(self, order: str, k: int) -> list[frozenset[int]]:
        """The set of each seed. The size -1 is the teacher."""
        if k == 0:
            return [frozenset() for _ in self.found]
        if k == -1:
            members = (found["orders"][order]["members"][-1] for found in self.found)
            return [frozenset(member["patched_layers"]) for member in members]
        return [sets_of(found, order)[k - 1] for found in self.found]

    def has(self, order: str, treatment: str) -> bool:
        return all(
            name_of(patched, treatment) in of["models"]
            for k in self.sizes
            for patched, of in zip(self.sets(order, k), self.scores)
        )

    def rows(self, order: str, k: int, treatment: str, score: str) -> Rows:
        names = (name_of(patched, treatment) for patched in self.sets(order, k))
        return [of["models"][name][score] for name, of in zip(names, self.scores)]

    def values(self, order: str, k: int, treatment: str, score: str = "kl") -> list[float]:
        """The score of each seed: KL in nats per token, or bits per byte."""
        units = sum(self.units[score])
        return [sum(row) / units for row in self.rows(order, k, treatment, score)]

    def mean_rows(self, order: str, treatment: str, score: str = "kl") -> Rows:
        """The mean over the sizes between student and teacher."""
        of_sizes = [self.rows(order, k, treatment, score) for k in self.sizes]
        return [[mean(texts) for texts in zip(*of_seed)] for of_seed in zip(*of_sizes)]

    def line(self, k: int, score: str) -> Rows:
        """What the size would have on the straight line from student to teacher."""
        student, teacher = self.parameters[0], self.parameters[-1]
        share = (self.parameters[k] - student) / (teacher - student)
        both = zip(self.rows("last", 0, "plain", score), self.rows("last", -1, "plain", score))
        return [
            [(1 - share) * s + share * t for s, t in zip(*of_seed, strict=True)] for of_seed in both
        ]

    def factors(self, order: str, k: int) -> list[dict[str, float]]:
        scales = (MatchedScales.from_dict(found["scales"], "the order") for found in self.found)
        sets = self.sets(order, k)
        return [
            {str(run): factor for run, factor in scale.factors(patched).items()}
            for scale, patched in zip(scales, sets)
        ]


def findings_of(pair: str, folder: Path, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Return what is found about a pair, None if not all seeds have been scored."""
    of_pair = folder / pair
    scored = [
        student
        for student in STUDENTS
        if all((of_pair / f"seed_{seed}" / f"{student}.scores.json").is_file() for seed in seeds)
    ]
    if "student" not in scored or not (of_pair / "baselines.json").is_file():
        return None
    scores = Scores(of_pair, "student", seeds)
    baselines = json.loads((of_pair / "baselines.json").read_text())
    found = {
        "pair": pair,
        "seeds": [*seeds],
        "settings": json.loads((of_pair / "settings.json").read_text()),
        "layers": scores.layers,
        "parameters": scores.parameters,
        "tokens": sum(scores.units["kl"]),
        "texts": len(scores.units["kl"]),
        "ratios": [of["length_ratios"] for of in scores.found],
        "student": ends(scores, 0),
        "teacher": ends(scores, -1),
        "orders": {order: of_order(scores, order) for order in ORDERS},
        "baselines": of_baselines(scores, baselines),
        "others": {
            student: of_other_student(scores, Scores(of_pair, student, seeds))
            for student in scored[1:]
        },
    }
    regret_path = of_pair / f"seed_{seeds[0]}" / "student.regret.json"
    if regret_path.is_file():
        found["regret"] = json.loads(regret_path.read_text())
    return found


def ends(scores: Scores, k: int) -> dict[str, list[float]]:
    return {score: scores.values("last", k, "plain", score) for score in ("kl", "cross_entropy")}


def of_order(scores: Scores, order: str) -> dict[str, Any]:
    treatments = [name for name in TREATMENTS if scores.has(order, name)]
    tokens = scores.units["kl"]
    plain = scores.mean_rows(order, "plain")
    found: dict[str, Any] = {
        "mean": {"plain": [sum(rows) / sum(tokens) for rows in plain]},
        "mean_gain": {},
        "sizes": [of_size(scores, order, k, treatments) for k in scores.sizes],
        "dip": {
            score: {
                name: gain(
                    scores.rows(order, 1, name, score),
                    scores.rows(order, 0, "plain", score),
                    scores.units[score],
                )
                for name in ("plain", "matched")
            }
            for score in ("kl", "cross_entropy")
        },
    }
    for name in treatments:
        rows = scores.mean_rows(order, name)
        found["mean"][name] = [sum(of_seed) / sum(tokens) for of_seed in rows]
        found["mean_gain"][name] = gain(plain, rows, tokens)
    return found


def of_size(scores: Scores, order: str, k: int, treatments: Sequence[str]) -> dict[str, Any]:
    plain = scores.rows(order, k, "plain", "kl")
    names = ("plain", *treatments)
    return {
        "num_layers_to_patch": k,
        "sets": [sorted(patched) for patched in scores.sets(order, k)],
        "factors": scores.factors(order, k),
        "kl": {name: scores.values(order, k, name) for name in names},
        "gain": {
            name: gain(plain, scores.rows(order, k, name, "kl"), scores.units["kl"])
            for name in treatments
        },
        "bits_per_byte": {
            name: scores.values(order, k, name, "cross_entropy") for name in ("plain", "matched")
        },
        "under_line": {
            name: gain(
                scores.line(k, "cross_entropy"),
                scores.rows(order, k, name, "cross_entropy"),
                scores.units["cross_entropy"],
            )
            for name in ("plain", "matched")
        },
    }


def of_baselines(scores: Scores, baselines: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte of the pruned teacher by size, and how many fewer the family takes."""
    units = scores.units["cross_entropy"]
    found: dict[str, Any] = {}
    for name, of_name in baselines["baselines"].items():
        found[name] = {
            "exponents": [of_size["exponent"] for of_size in of_name],
            **{
                treatment: [sum(of[treatment]["cross_entropy"]) / sum(units) for of in of_name]
                for treatment in ("plain", "matched")
            },
            "lead": {
                order: {
                    treatment: [
                        gain(
                            [of[treatment]["cross_entropy"]] * len(scores.found),
                            scores.rows(order, k, treatment if k else "plain", "cross_entropy"),
                            units,
                        )
                        for k, of in enumerate(of_name)
                    ]
                    for treatment in ("plain", "matched")
                }
                for order in ORDERS
            },
        }
    return found


def of_other_student(plain: Scores, other: Scores) -> dict[str, Any]:
    """Mean KL of another student's sizes, with and without factors, and how much lower that is than
    the plain student's with factors.
    """
    tokens = plain.units["kl"]
    found: dict[str, Any] = {
        "student": ends(other, 0),
        "layers": other.layers,
        "ratios": [of["length_ratios"] for of in other.found],
        "orders": {},
    }
    for order in ORDERS:
        before = {name: plain.mean_rows(order, name) for name in ("plain", "matched")}
        of_other = {name: other.mean_rows(order, name) for name in ("plain", "matched")}
        found["orders"][order] = {
            "mean": {
                name: [sum(row) / sum(tokens) for row in rows] for name, rows in of_other.items()
            },
            "gain_over_matched": {
                name: gain(before["matched"], rows, tokens) for name, rows in of_other.items()
            },
            "gain_as_is": gain(before["plain"], of_other["plain"], tokens),
            "gain_of_matching": gain(of_other["plain"], of_other["matched"], tokens),
        }
    return found
