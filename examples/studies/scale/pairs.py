"""The pairs of the study: their texts, teachers, students, and every score. What is finished is not
done again.

    F/PAIR/teacher, train.jsonl, calibration.jsonl, heldout.jsonl
    F/PAIR/seed_S/student                  distilled; student_length with a length term, and
                                           student_auto with chosen layers
    F/PAIR/seed_S/student.order.json       its orders and factors, found on calibration text
    F/PAIR/seed_S/student.scores.json      its models on held-out text
    F/PAIR/seed_S/student.regret.json      the first seed's orders next to the best one
    F/PAIR/baselines.json                       the pruned teacher on held-out text
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from examples.commands import run_here
from examples.studies.orders import PAIRS, distillation, teacher_of, train_teacher, write_texts
from examples.studies.scale.pruned import baseline_scores
from examples.studies.scale.regret import regrets
from examples.studies.scale.scores import Scorer, Variant, text_sizes
from examples.studies.scale.stream import AlignedStates
from patching.blocks import as_layer_list
from patching.family import Family
from patching.files.outputs import write_json
from patching.matched_scale import MatchedScales
from patching.orders.findings import findings, matched_scales, order_file, tried_orders
from patching.orders.measurements import Measurements
from patching.recipe import patched_model, with_scales
from patching.running.calibration import Calibration
from train import distillation as distillation_page
from train.loss import cosine_distance

ORDERS = ("last", "first", "klpatch")
NAMED_ORDERS = ("last", "first")
SETTINGS: dict[str, dict[str, Any]] = {"gpt_neox": {"alternate_every_n_layers": 2}}
"""What differs from the pairs of the study of orders: these have more sizes."""
TEXTS, TOKENS = 32, 128
"""Passages of calibration text, and as many of held-out text, and tokens that are read of each."""
ONE_FACTOR = 1.2
LENGTH_WEIGHT = 0.1
"""The weight of the length term, next to a weight of 1 for the cosine term."""
STUDENTS = ("student", "student_length", "student_auto")
"""As the demo's, with a length term, and with chosen layers (`--kept_layers auto`)."""


def make(
    pair: str,
    folder: Path,
    seeds: Sequence[int],
    students: Sequence[str],
    teacher_steps: int,
    student_steps: int,
) -> None:
    """Train and measure what is missing of a pair."""
    of_pair = folder / pair
    if not (of_pair / "heldout.jsonl").is_file():
        write_texts(PAIRS[pair]["text"], of_pair)
    if pair != "demo" and not (of_pair / "teacher" / "training.json").is_file():
        train_teacher(pair, of_pair, teacher_steps, seed=0)
    for student in students:
        for seed in seeds:
            path = of_pair / f"seed_{seed}" / student
            if not (path / "config.json").is_file():
                distill(pair, of_pair, path, {"seed": seed, "max_steps": student_steps})
            family = Family.from_pretrained(
                teacher_of(pair, of_pair), path, "last", match_scale=False, dtype="float32"
            )
            measure(family, of_pair, path)
            if (student, seed) == (STUDENTS[0], seeds[0]):
                measure_regret(family, of_pair, path)
            if not (of_pair / "baselines.json").is_file():
                texts = (text(of_pair, name) for name in ("calibration", "heldout"))
                write_json(of_pair / "baselines.json", baseline_scores(family, *texts))


def distill(pair: str, of_pair: Path, path: Path, settings: dict[str, Any]) -> None:
    settings = {"eval_dataset": None, "heldout_documents": 2} | SETTINGS.get(pair, {}) | settings
    if path.name == "student_auto":
        calibration = {"calibration": of_pair / "calibration.jsonl", "calibration_texts": TEXTS}
        settings |= {"kept_layers": "auto", **calibration, "calibration_length": TOKENS}
    command = distillation(pair, of_pair, str(path.relative_to(of_pair)), **settings)
    with length_term() if path.name == "student_length" else nullcontext():
        run_here(*command)


def length_term() -> AbstractContextManager:
    """Add the squared logarithm of the ratio of lengths to the cosine term of each pair of hidden
    states. `train.train` has no such term.
    """

    def distance(
        student_BTD: Tensor, teacher_BTD: Tensor, is_compared_BT: Tensor, backend: str | None
    ) -> Tensor:
        cosine = cosine_distance(student_BTD, teacher_BTD, is_compared_BT, backend)
        with torch.autocast(student_BTD.device.type, enabled=False):
            ratio_BT = student_BTD.float().norm(dim=-1) / teacher_BTD.float().norm(dim=-1)
            squares_BT = ratio_BT.clamp_min(1e-8).log().square()
            return cosine + LENGTH_WEIGHT * (squares_BT * is_compared_BT).sum()

    return patch.object(distillation_page, "cosine_distance", distance)


def text(of_pair: Path, name: str) -> Calibration:
    return Calibration.read(str(of_pair / f"{name}.jsonl"), num_texts=TEXTS, length=TOKENS)


def measure(family: Family, of_pair: Path, path: Path) -> None:
    """Search orders and factors on calibration text, and score every model on held-out text."""
    order_path, scores_path = (Path(f"{path}.{name}.json") for name in ("order", "scores"))
    if not order_path.is_file():
        write_json(order_path, searched(family, of_pair, path))
    if scores_path.is_file():
        return
    batches = text(of_pair, "heldout").batches(family.tokenizer, family.configs["teacher"])
    scorer = Scorer(family, batches)
    found = json.loads(order_path.read_text())
    parents = family.parents.load(("teacher", "student"))
    calibration = text(of_pair, "calibration").batches(family.tokenizer, family.configs["teacher"])
    fitted = AlignedStates.of(**parents, layer_map=family.layer_map, batches=calibration)
    given = AlignedStates.of(**parents, layer_map=family.layer_map, batches=batches)
    variants = dict(variants_of(family, found, fitted, given, path.name == "student"))
    scores = {name: scorer.of(variant)._asdict() for name, variant in variants.items()}
    write_json(scores_path, text_sizes(family, batches) | {"models": scores})


def searched(family: Family, of_pair: Path, path: Path) -> dict[str, Any]:
    calibration = text(of_pair, "calibration")
    measurements = Measurements(family, calibration, Path(f"{path}.order_kl.json"))
    tried = tried_orders(measurements, searches=("klpatch",))
    scales = matched_scales(measurements, tried)
    found = findings(measurements, tried, scales)
    return order_file(measurements, found, scales, {}) | {"length_ratios": measurements.ratios}


def measure_regret(family: Family, of_pair: Path, path: Path) -> None:
    regret_path = Path(f"{path}.regret.json")
    if not regret_path.is_file():
        kl_path = Path(f"{path}.order_kl.json")
        measurements = Measurements(family, text(of_pair, "calibration"), kl_path)
        write_json(regret_path, regrets(measurements, ORDERS))


def variants_of(
    family: Family,
    found: dict[str, Any],
    fitted: AlignedStates,
    given: AlignedStates,
    with_others: bool,
) -> Iterator[tuple[str, Variant]]:
    """Yield the names and models to score. `fitted` are states of calibration text, `given` those
    of the text to score. Without the others there are only plain and rescaled models.
    """
    scales = MatchedScales.from_dict(found["scales"], "the order")
    layers = range(len(family.layer_map.kept))
    for patched in (frozenset(), frozenset(layers)):
        yield name_of(patched, "plain"), Variant(patched_model(family.layer_map, patched))
    for order in ORDERS:
        for patched in sets_of(found, order):
            recipe = patched_model(family.layer_map, patched)
            matched = with_scales(recipe, scales.factors(patched))
            yield name_of(patched, "plain"), Variant(recipe)
            yield name_of(patched, "matched"), Variant(matched)
            if not with_others:
                continue
            starts = [run[0] for run in recipe.student_runs]
            one = with_scales(recipe, dict.fromkeys(starts, ONE_FACTOR))
            yield name_of(patched, "one"), Variant(one)
            rotations = fitted.rotations(recipe)
            yield name_of(patched, "rotated"), Variant(recipe, rotations)
            yield name_of(patched, "rotated and matched"), Variant(matched, rotations)
            if order in NAMED_ORDERS:
                for what in ("length", "direction"):
                    yield name_of(patched, what), Variant(recipe, given.given(recipe, what))


def name_of(patched: frozenset[int], treatment: str) -> str:
    return f"{as_layer_list(sorted(patched))} {treatment}"


def sets_of(found: dict[str, Any], order: str) -> list[frozenset[int]]:
    """The sets of an order's sizes between student and teacher."""
    return [
        frozenset(member["patched_layers"]) for member in found["orders"][order]["members"][1:-1]
    ]
