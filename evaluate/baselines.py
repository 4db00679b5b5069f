"""Baselines: the teacher pruned to each size's depth in other ways, evaluated alongside the family.

A baseline is one row of BASELINES. If it only takes layers from the teacher, it loads and runs
together with the family. If it merges layers, its models run on their own. Nothing here is imported
for `--help` but the table itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from patching.files.json_files import check_types, read_object

if TYPE_CHECKING:
    from evaluate.plan import Plan
    from evaluate.ranks import Ranks
    from patching.recipe import Recipe
    from patching.running.layer_collapse import CollapsedTeacher

T = TypeVar("T")
FEW_TEXTS, FEW_TOKENS = 10, 64
"""Calibration texts, and tokens of each, on which layer collapse compares models. Its authors take
a few sentences.
"""


class Baseline(NamedTuple):
    label: str
    """Its name in reports."""
    description: str
    """What it prunes, for `--help`."""
    needs_text: str | None
    """Why it needs calibration text; None if it needs none."""
    model_of_size: Callable[[Plan, Ranks], Callable[[int], Recipe | CollapsedTeacher]]
    """Called with a plan and the ranks. Returns what to make the model of each size k from, of the
    same depth as the family's member, the same on every rank."""


def naive(plan: Plan, ranks: Ranks) -> Callable[[int], Recipe]:
    return plan.family.naive_recipe


def least_influential_removed(plan: Plan, ranks: Ranks) -> Callable[[int], Recipe]:
    from patching.running.block_influence import most_influential

    influences = ranks.from_first(ranks.together(lambda: teacher_influences(plan), only_first=True))
    return lambda k: most_influential(influences, plan.family.recipe(k).depth)


def layers_collapsed(plan: Plan, ranks: Ranks) -> Callable[[int], CollapsedTeacher]:
    found = ranks.from_first(ranks.together(lambda: collapsed_teachers(plan), only_first=True))
    return lambda k: found[plan.family.recipe(k).depth]


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
    "laco": Baseline(
        "layers merged by LaCo",
        "the teacher with later layers merged into earlier ones, so that its last hidden states on "
        "the calibration text change little",
        "the similarity of merged models is measured on text",
        layers_collapsed,
    ),
}


def teacher_influences(plan: Plan) -> list[float]:
    """Return the block influence of each teacher layer, kept in the results folder."""
    from patching.running.block_influence import block_influence

    def measure() -> list[float]:
        teacher = plan.family.parents.load(["teacher"])["teacher"]
        text = plan.calibration.batches(plan.family.tokenizer, teacher.config)
        return block_influence(teacher, text)

    def read(stored: Any) -> list[float]:
        check_types(stored, list[float], "block_influence")
        if len(stored) != plan.family.layer_map.num_teacher_layers:
            raise ValueError(f"it has {len(stored)} layers")
        return stored

    return kept(plan, "block_influence", measure, read)


def collapsed_teachers(plan: Plan) -> dict[int, CollapsedTeacher]:
    """Return the collapsed teacher of each depth in the family, kept in the results folder.

    Raises ValueError for a depth that merging cannot reach.
    """
    from patching.running.layer_collapse import (
        CollapsedLayer,
        CollapsedTeacher,
        collapse,
        similarity_on,
    )

    family, text = plan.family, plan.calibration
    num_layers = family.layer_map.num_teacher_layers
    depths = [family.recipe(k).depth for k in range(family.max_layers_to_patch)]

    def search() -> list[dict[str, Any]]:
        teacher = family.parents.load(["teacher"])["teacher"]
        few = replace(text, texts=text.texts[:FEW_TEXTS], length=min(text.length, FEW_TOKENS))
        similarity = similarity_on(teacher, few.batches(family.tokenizer, teacher.config))
        found = [collapse(num_layers, depth, similarity) for depth in depths]
        return [of_depth._asdict() | {"teacher": of_depth.teacher.layers} for of_depth in found]

    def read(stored: Any) -> dict[int, CollapsedTeacher]:
        found = {}
        for depth, of_depth in zip(depths, stored, strict=True):
            layers = [
                CollapsedLayer(place, tuple((t, weight) for t, weight in weights))
                for place, weights in of_depth["teacher"]
            ]
            terms = [term for layer in layers for term in ((layer.place, 1), *layer.weights)]
            check_types([number for term in terms for number in term], list[int], "laco")
            if len(layers) != depth or not {t for t, _ in terms} <= {*range(num_layers)}:
                raise ValueError(f"it has other layers than {depth} of {num_layers}")
            found[depth] = CollapsedTeacher(tuple(layers))
        return found

    return kept(plan, "laco", search, read, depths=depths)


def kept(
    plan: Plan,
    baseline: str,
    compute: Callable[[], Any],
    read: Callable[[Any], T],
    **also_from: Any,
) -> T:
    """Return what a baseline computes from the teacher and the calibration text. It is kept in the
    results folder as JSON data for further runs, and `read` makes of the data what is returned.

    Raises ValueError if the file is damaged.
    """
    from patching.files.outputs import write_json

    path = plan.arguments.save_directory / f"{baseline}.json"
    settings, text = plan.settings[baseline], plan.calibration
    made_from = {"teacher": settings["teacher"], "dtype": settings["dtype"], "text": text.sha256}
    made_from |= also_from
    if path.is_file():
        stored = read_object(path)
        if stored.get("made_from") == made_from:
            try:
                return read(stored[baseline])
            except (KeyError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"{path} is damaged ({reason}): remove it") from error
    computed = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {baseline: computed, "text": text.name, "made_from": made_from})
    return read(computed)
