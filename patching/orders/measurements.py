"""What a search knows about a family: the KL of its members and of rescaled ones, the teacher's
block influence, and how long the residual stream is in both models.

All are measured when first asked for. With a file they are kept on disk, so that a search that was
stopped resumes where it was.
"""

import math
import warnings
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from patching.architectures.models import predicts_masked_tokens
from patching.blocks import as_layer_list
from patching.family import Family, identity_of
from patching.orders.measured import Measured, point_name
from patching.orders.scales import BudgetSpent, Point, RowSums
from patching.orders.search import PatchedLayers
from patching.recipe import Recipe, patched_model, with_scales
from patching.running.block_influence import block_influence
from patching.running.calibration import Calibration
from patching.running.lengths import length_ratios
from patching.running.logits import logit_change
from patching.running.teacher_kl import TeacherKL

MEASURED_FILE_NAME = "order_kl.json"

SETS_PER_TREE = 64
"""Sets whose models are measured together, so that shared prefixes of layers run only once."""
RESCALED_PER_TREE = 4
"""The same for rescaled models, each of which has tensors of its own."""


class Measurements:
    """The mean KL from the teacher, in nats per token, of every set of patched layers asked for.

    Calling it with sets measures the missing ones. Weights load with the first of them. A model
    whose logits overflow has an infinite KL; if all have, FloatingPointError is raised. `path`
    is the file to keep the numbers in, rewritten after every tree of models. `budget` is how many
    models may be measured besides those in the file; what would take more raises BudgetSpent.

    Raises ValueError for a file made from other models, text or dtype, for encoders, and for models
    whose logits cannot be reproduced.
    """

    def __init__(
        self,
        family: Family,
        text: Calibration,
        path: Path | None = None,
        budget: int | None = None,
    ) -> None:
        self.family, self.text = family, text
        self.budget, self.num_measured = math.inf if budget is None else budget, 0
        for config in family.configs.values():
            if predicts_masked_tokens(config):
                raise ValueError(
                    "orders are searched for models that predict the next token, not for "
                    f"{config.model_type}: choose --order last, first or a file"
                )
        logit_change(family.layouts["teacher"].model)  # raises here, before weights load
        self.settings = identity_of(family) | {
            "dtype": str(family.dtype).removeprefix("torch."),
            "text": text.name,
            "text_sha256": text.sha256,
        }
        self.known = Measured.open(self.settings, path)
        self.kl, self.rows = self.known.kl, self.known.rows

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return self.text.batches(self.family.tokenizer, self.family.configs["teacher"])

    @cached_property
    def tokens_of_rows(self) -> list[int]:
        """Tokens of each row of text."""
        return [n for batch in self.batches for n in batch["attention_mask"].sum(-1).tolist()]

    @cached_property
    def teacher_kl(self) -> TeacherKL:
        parents = self.family.parents.load(("teacher", "student"))
        return TeacherKL(**parents, batches=self.batches)

    def __call__(self, sets: Collection[PatchedLayers]) -> Mapping[PatchedLayers, float]:
        layer_map = self.family.layer_map
        layers = range(len(layer_map.kept))
        # In this sequence, sets next to each other share the longest prefixes of layers.
        missing = sorted(
            set(sets) - self.kl.keys(), key=lambda patched: [i in patched for i in layers]
        )
        self._spend(len(missing))
        starts = range(0, len(missing), SETS_PER_TREE)
        for start in tqdm(starts, desc="trees of models", disable=len(starts) < 2):
            group = missing[start : start + SETS_PER_TREE]
            names = {patched: as_layer_list(sorted(patched)) for patched in group}
            found = self.teacher_kl.of(
                {name: patched_model(layer_map, patched) for patched, name in names.items()},
                remember=len(missing) <= SETS_PER_TREE,
            )
            self.kl |= {patched: found[name] for patched, name in names.items()}
            self.known.write()
        self._check_finite([self.kl[patched] for patched in missing])
        return self.kl

    def of_rows(self, points: Collection[Point]) -> Mapping[Point, RowSums]:
        """Measure rescaled models. Return the KL of all known ones, summed over each row of text.
        What is not a number is infinite.
        """
        missing = sorted(set(points) - self.rows.keys(), key=point_name)
        self._spend(len(missing))
        starts = range(0, len(missing), RESCALED_PER_TREE)
        for start in tqdm(starts, desc="trees of rescaled models", disable=len(starts) < 2):
            group = missing[start : start + RESCALED_PER_TREE]
            names = {point: point_name(point) for point in group}
            found = self.teacher_kl.sums_of_rows(
                {name: self._recipe(point) for point, name in names.items()}
            )
            for point, name in names.items():
                self.rows[point] = [x if math.isfinite(x) else math.inf for x in found[name]]
            self.known.write()
        return self.rows

    def _recipe(self, point: Point) -> Recipe:
        recipe = patched_model(self.family.layer_map, point.patched_layers)
        starts = [run[0] for run in recipe.student_runs]
        return with_scales(recipe, dict(zip(starts, point.factors, strict=True)))

    def _spend(self, num_models: int) -> None:
        if self.num_measured + num_models > self.budget:
            raise BudgetSpent(f"{num_models} models more than the {self.budget} allowed")
        self.num_measured += num_models

    @property
    def influences(self) -> list[float]:
        """Block influence of each teacher layer."""
        if self.known.influences is None:
            teacher = self.family.parents.load(["teacher"])["teacher"]
            self.known.influences = block_influence(teacher, self.batches)
            self.known.write()
        return self.known.influences

    @property
    def ratios(self) -> list[float]:
        """Median ratio of lengths before each student layer, teacher over student."""
        if self.known.ratios is None:
            parents = self.family.parents.load(("teacher", "student"))
            self.known.ratios = length_ratios(
                **parents, layer_map=self.family.layer_map, batches=self.batches
            )
            self.known.write()
        return self.known.ratios

    def _check_finite(self, new: Collection[float]) -> None:
        """Warn if some of the KL just measured are infinite. Raise FloatingPointError if all are
        that were measured so far.
        """
        num_lost = sum(map(math.isinf, new))
        if not num_lost:
            return
        remedy = "check the models' weights"
        if self.family.dtype != torch.float32:
            remedy = "they overflow in this dtype: use --dtype float32"
        found = (
            f"KL of models in {self.settings['dtype']}: {num_lost} of {len(new)} are not numbers"
        )
        if all(map(math.isinf, self.kl.values())):
            raise FloatingPointError(f"{found} ({remedy})")
        warnings.warn(f"{found} and rank last ({remedy})", stacklevel=3)

    def mean_kl(self, sets: Collection[PatchedLayers]) -> float:
        """Mean over measured sets."""
        return sum(self.kl[patched] for patched in sets) / len(sets)
