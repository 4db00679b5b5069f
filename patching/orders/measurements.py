"""What a search knows about a family: the KL of its members, and the teacher's block influence.

Both are measured when first asked for. With a file they are kept on disk, so that a search that was
stopped resumes where it was.
"""

import json
import math
import warnings
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from patching.architectures.models import predicts_masked_tokens
from patching.blocks import as_layer_list
from patching.family import Family
from patching.files.outputs import finite_or_none, write_json
from patching.orders.search import PatchedLayers
from patching.recipe import patched_model
from patching.running.block_influence import block_influence
from patching.running.calibration import Calibration
from patching.running.logits import logit_change
from patching.running.teacher_kl import TeacherKL

MEASURED_FILE_NAME = "order_kl.json"

SETS_PER_TREE = 64
"""Sets whose models are measured together, so that shared prefixes of layers run only once."""


class Measurements:
    """The mean KL from the teacher, in nats per token, of every set of patched layers asked for.

    Calling it with sets measures the missing ones. Weights load with the first of them. A model
    whose logits overflow has an infinite KL; if all have, FloatingPointError is raised. `path`
    is the file to keep the numbers in, rewritten after every tree of models.

    Raises ValueError for a file made from other models, text or dtype, for encoders, and for models
    whose logits cannot be reproduced.
    """

    def __init__(self, family: Family, text: Calibration, path: Path | None = None) -> None:
        self.family, self.text, self.path = family, text, path
        self.kl: dict[PatchedLayers, float] = {}
        self._influences: list[float] | None = None
        for config in family.configs.values():
            if predicts_masked_tokens(config):
                raise ValueError(
                    "orders are searched for models that predict the next token, not for "
                    f"{config.model_type}: choose --order last, first or a file"
                )
        logit_change(family.layouts["teacher"].model)  # raises here, before weights load
        self.settings = family.identity | {
            "dtype": str(family.dtype).removeprefix("torch."),
            "text": text.name,
            "text_sha256": text.sha256,
        }
        if path is not None and path.is_file():
            self._read(path)

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return self.text.batches(self.family.tokenizer, self.family.configs["teacher"])

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
        starts = range(0, len(missing), SETS_PER_TREE)
        for start in tqdm(starts, desc="trees of models", disable=len(starts) < 2):
            group = missing[start : start + SETS_PER_TREE]
            names = {patched: as_layer_list(sorted(patched)) for patched in group}
            found = self.teacher_kl.of(
                {name: patched_model(layer_map, patched) for patched, name in names.items()},
                remember=len(missing) <= SETS_PER_TREE,
            )
            self.kl |= {patched: found[name] for patched, name in names.items()}
            self._write()
        self._check_finite([self.kl[patched] for patched in missing])
        return self.kl

    @property
    def influences(self) -> list[float]:
        """Block influence of each teacher layer."""
        if self._influences is None:
            teacher = self.family.parents.load(["teacher"])["teacher"]
            self._influences = block_influence(teacher, self.batches)
            self._write()
        return self._influences

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

    def _write(self) -> None:
        if self.path is None:
            return
        kl = {as_layer_list(sorted(patched)): value for patched, value in self.kl.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path,
            {
                "settings": self.settings,
                "block_influence": self._influences,
                "kl": finite_or_none(kl),
            },
        )

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, kl, influences = stored["settings"], stored["kl"], stored["block_influence"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it") from error
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path} was measured with {name}={before.get(name)}, not {value}: choose "
                    "another folder, or the same settings"
                )
        self._influences = influences
        self.kl = {
            frozenset(map(int, filter(None, layers.split(",")))): math.inf
            if value is None
            else value
            for layers, value in kl.items()
        }
