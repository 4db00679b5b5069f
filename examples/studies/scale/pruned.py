"""The pruned teacher with the help that the family gets: factors where layers are missing."""

from typing import Any

from examples.studies.scale.scores import Scorer, Variant
from examples.studies.scale.stream import gap_factors, times
from patching.family import Family
from patching.recipe import Recipe, naively_pruned, whole_model
from patching.running.block_influence import block_influence, most_influential
from patching.running.calibration import Calibration

EXPONENTS = (0.0, 0.5, 1.0, 1.5)
"""Powers of the median ratios at a pruned teacher's gaps that are tried."""


def baseline_scores(
    family: Family, calibration: Calibration, held_out: Calibration
) -> dict[str, Any]:
    """The teacher pruned to the depth of each size, naively and by block influence, as it is and
    rescaled where layers are missing, on held-out text. Factors are chosen by KL on calibration
    text.
    """
    chosen_on, scored_on = (
        text.batches(family.tokenizer, family.configs["teacher"])
        for text in (calibration, held_out)
    )
    teacher = family.parents.load(["teacher"])["teacher"]
    influences = block_influence(teacher, chosen_on)
    chooser, scorer = Scorer(family, chosen_on), Scorer(family, scored_on)
    found: dict[str, Any] = {}
    for k in range(family.max_layers_to_patch):
        family_recipe = family.recipe(k)
        recipes = {
            "naive": naively_pruned(family.layer_map, family_recipe),
            "block influence": most_influential(influences, family_recipe.depth),
        }
        for name, recipe in recipes.items():
            ratios = gap_factors(teacher, recipe, chosen_on)
            tried = {power: rescaled(recipe, ratios, power) for power in EXPONENTS}
            kl = {power: sum(chooser.of(variant).kl) for power, variant in tried.items()}
            best = min(kl, key=kl.__getitem__)
            scores = {"plain": scorer.of(tried[0.0]), "matched": scorer.of(tried[best])}
            found.setdefault(name, []).append(
                {
                    "num_layers_to_patch": k,
                    "layers": [source.layer_idx for source in recipe.layers],
                    "ratios": ratios,
                    "exponent": best,
                    **{treatment: score._asdict() for treatment, score in scores.items()},
                }
            )
    whole = whole_model(family.layer_map.num_teacher_layers)
    return {"baselines": found, "teacher": scorer.of(Variant(whole))._asdict()}


def rescaled(recipe: Recipe, ratios: dict[int, float], power: float) -> Variant:
    return Variant(recipe, {depth: times(ratio**power) for depth, ratio in ratios.items() if power})
