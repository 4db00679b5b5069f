"""TODO."""

import json
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from patching.architectures.checks import check_logits_are_the_heads
from patching.architectures.models import predicts_masked_tokens
from patching.blocks import as_layer_list
from patching.family import Family
from patching.files.outputs import write_json
from patching.orders.search import PatchedLayers
from patching.recipe import Parent, patched_model
from patching.running.block_influence import block_influence
from patching.running.calibration import Calibration
from patching.running.teacher_kl import TeacherKL

MEASURED_FILE_NAME = "order_kl.json"

SETS_PER_TREE = 64
"""Sets whose models are measured together: what they share is run once, what they give is kept."""


Load = Callable[[], Mapping[Parent, PreTrainedModel]]


class Measurements:
    """The KL of every set of patched layers measured so far, and the teacher's block influences.

    With a `path` they are kept in a file, written after every tree of models, and taken from it;
    weights are loaded when something is missing.

    Raises ValueError for a file that was made of other models, text or dtype, and for models that
    cap or scale their logits.
    """

    def __init__(
        self,
        family: Family,
        text: Calibration,
        dtype: torch.dtype,
        load: Load,
        path: Path | None = None,
    ) -> None:
        self.family, self.text, self.load, self.path = family, text, load, path
        self.kl: dict[PatchedLayers, float] = {}
        self._influences: list[float] | None = None
        for config in family.configs.values():
            check_logits_are_the_heads(config)
            if predicts_masked_tokens(config):
                raise ValueError(
                    f"orders are searched for models that predict the next token, not for "
                    f"{config.model_type}: choose --order last, first or a file"
                )
        self.settings = family.identity | {
            "dtype": str(dtype).removeprefix("torch."),
            "text": text.name,
            "text_sha256": text.sha256,
        }
        if path is not None and path.is_file():
            self._read(path)

    @cached_property
    def models(self) -> Mapping[Parent, PreTrainedModel]:
        return self.load()

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return self.text.batches(self.family.tokenizer, self.family.configs["teacher"])

    @cached_property
    def teacher_kl(self) -> TeacherKL:
        return TeacherKL(**self.models, batches=self.batches)

    def __call__(self, sets: Collection[PatchedLayers]) -> Mapping[PatchedLayers, float]:
        layer_map = self.family.layer_map
        layers = range(len(layer_map.kept))
        # Neighbours in this sequence share the longest prefixes.
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
        return self.kl

    @property
    def influences(self) -> list[float]:
        """Of the teacher's layers."""
        if self._influences is None:
            self._influences = block_influence(self.models["teacher"], self.batches)
            self._write()
        return self._influences

    def _write(self) -> None:
        if self.path is None:
            return
        kl = {as_layer_list(sorted(patched)): value for patched, value in self.kl.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path, {"settings": self.settings, "block_influence": self._influences, "kl": kl}
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
                    f"{path} was measured with {name}={before.get(name)} and {value} is asked for "
                    "now: choose another folder, or the same settings"
                )
        self._influences = influences
        self.kl = {
            frozenset(map(int, filter(None, layers.split(",")))): value
            for layers, value in kl.items()
        }
