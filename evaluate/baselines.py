"""Baselines: the teacher pruned to each size's depth in other ways, evaluated alongside the family.

A baseline is one row of BASELINES. It takes all layers from the teacher, so it loads and runs
together with the family. Nothing here is imported for `--help` but the table itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from evaluate.plan import Plan
    from evaluate.ranks import Ranks
    from patching.recipe import Recipe


class Baseline(NamedTuple):
    label: str
    """Its name in reports."""
    description: str
    """What it prunes, for `--help`."""
    needs_text: str | None
    """Why it needs calibration text; None if it needs none."""
    recipe_of_size: Callable[[Plan, Ranks], Callable[[int], Recipe]]
    """Called with a plan and the ranks. Returns the recipe for each size k, of the same depth as
    the family's member, the same on every rank."""


def naive(plan: Plan, ranks: Ranks) -> Callable[[int], Recipe]:
    return plan.family.naive_recipe


def least_influential_removed(plan: Plan, ranks: Ranks) -> Callable[[int], Recipe]:
    from patching.running.block_influence import most_influential

    influences = ranks.from_first(teacher_influences(plan) if ranks.is_first else None)
    return lambda k: most_influential(influences, plan.family.recipe(k).depth)


BASELINES = {
    "naive": Baseline(
        "naively pruned",
        "the teacher pruned to the same depth without distillation",
        None,
        naive,
    ),
    "block_influence": Baseline(
        "pruned by block influence",
        "the teacher without the layers of least block influence on the calibration text, as "
        "ShortGPT prunes",
        "block influence is measured on text",
        least_influential_removed,
    ),
}


def teacher_influences(plan: Plan) -> list[float]:
    """Return the block influence of each teacher layer, kept in the results folder for further
    runs.
    """
    from patching.files.outputs import write_json
    from patching.running.block_influence import block_influence

    path = plan.arguments.save_directory / "block_influence.json"
    settings = plan.settings["block_influence"]
    text = plan.calibration
    made_from = {"teacher": settings["teacher"], "dtype": settings["dtype"], "text": text.sha256}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("made_from") == made_from:
            return kept["block_influence"]
    teacher = plan.family.parents.load(["teacher"])["teacher"]
    influences = block_influence(teacher, text.batches(plan.family.tokenizer, teacher.config))
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"block_influence": influences, "text": text.name, "made_from": made_from}
    write_json(path, values)
    return influences
