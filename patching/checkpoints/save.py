"""Save one member of a family as an ordinary checkpoint, with a card and a record of what made it.

A plan is checked before anything is written: which bytes go where, or, if files cannot be copied
byte by byte, the assembled model.
"""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from patching.architectures.layer_pattern import keeps_period, whole_periods_order
from patching.assemble import assemble
from patching.blocks import as_layer_list
from patching.checkpoints.companions import Companions, plan_companions
from patching.checkpoints.model_card import model_card
from patching.checkpoints.origin import CARD_FILE_NAME, Origin, local_names, origin_of
from patching.checkpoints.sizes import Size
from patching.checkpoints.splice import OtherLayout, OutOfRange, Splice, plan_splice
from patching.family import MAX_SHARD_BYTES, Family
from patching.files.json_files import read_object
from patching.files.outputs import (
    check_space,
    environment,
    new_folder,
    write_json,
    write_text,
)
from patching.patch_order import WHOLE_PERIODS
from patching.recipe import Parent, Recipe

PROVENANCE_FILE_NAME = "provenance.json"


@dataclass(frozen=True)
class SavePlan:
    """Everything needed to write one member's checkpoint."""

    family: Family
    patched_layers: frozenset[int]
    recipe: Recipe
    size: Size
    companions: Companions
    weights: Splice | PreTrainedModel
    """A plan to copy bytes, or the model if its parents have to be loaded."""
    reason_to_load: str | None
    """Why the parents have to be loaded, None if their bytes are copied."""
    max_shard_bytes: int

    @property
    def num_layers_to_patch(self) -> int:
        return self.family.layer_map.num_patched(self.patched_layers)

    def save(
        self,
        folder: Path,
        title: str,
        arguments: Mapping[str, Any],
        same_files: Mapping[str, Path] | None = None,
    ) -> None:
        """Write the checkpoint to `folder`, which appears only when it is complete.

        `title` names the model on its card, and `arguments` are recorded in provenance.json.
        `same_files` are weights files that exist already, by the name they have in this checkpoint.
        They become hard links where the file system has them.

        Raises OSError, and leaves nothing behind, if the disk is full or a parent's file changes,
        and likewise OutOfRange if a number is too large for the dtype.
        """
        try:
            with new_folder(folder) as staging:
                self._fill(staging, title, arguments, same_files)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{folder} could not be written ({reason}), and nothing is left of it"
            ) from error

    def _fill(
        self,
        folder: Path,
        title: str,
        arguments: Mapping[str, Any],
        same_files: Mapping[str, Path] | None,
    ) -> None:
        """Write the files. What makes the folder loadable, config.json, comes last."""
        family, weights = self.family, self.weights
        origins, scale = self._origins(), self._scale()
        if isinstance(weights, Splice):
            weights.write(folder, same_files)
        else:
            _write_weights(weights, folder, self.max_shard_bytes)
        config = family.configs["teacher"]
        card = model_card(title, self.recipe, self.size, origins, config, scale)
        write_text(folder / CARD_FILE_NAME, card)
        provenance = self._made_by(arguments) | {"environment": environment()}
        write_json(folder / PROVENANCE_FILE_NAME, provenance)
        self.companions.write(folder)

    def is_saved_in(self, folder: Path, arguments: Mapping[str, Any]) -> bool:
        """Return whether the same command saved this member in `folder`, from the same parents."""
        try:
            before = read_object(folder / PROVENANCE_FILE_NAME)
        except (OSError, ValueError):
            return False
        before.pop("environment", None)
        now = json.loads(json.dumps(self._made_by(arguments), default=str))
        return before == now and (folder / "config.json").is_file()

    def _origins(self) -> dict[Parent, Origin]:
        return {
            parent: origin_of(reference)
            for parent, reference in self.family.parents.references.items()
            if parent in self.recipe.parents
        }

    def _scale(self) -> dict[str, Any] | None:
        scales = self.family.scales
        return None if scales is None else scales.described(self.patched_layers)

    def _made_by(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what decides the checkpoint, for provenance.json."""
        scale = self._scale()
        return {
            "order": self.family.order,
            "num_layers_to_patch": self.num_layers_to_patch,
            "patched_layers": sorted(self.patched_layers),
            "recipe": self.recipe.to_dict(),
            **({} if scale is None else {"matched_scale": scale}),
            **self.size.to_dict(),
            "parents": {parent: origin.to_dict() for parent, origin in self._origins().items()},
            "copied_file_to_file": isinstance(self.weights, Splice),
            # Not uploaded: see `patching.checkpoints.origin.shareable`.
            "local_parents": local_names(self.family.parents.references),
            "arguments": dict(arguments),
        }


def same_files(
    plans: Sequence[SavePlan], folders: Sequence[Path], saved: Collection[Path] = ()
) -> list[dict[str, Path]]:
    """Return for each of several members the weights files that are the same in an earlier member,
    by name: they need to be stored only once. Members whose folders are in `saved` are there.

    Raises ValueError if there is too little space for all others.
    """
    written: dict[Any, Path] = {}
    found: list[dict[str, Path]] = []
    num_bytes = 0
    for plan, folder in zip(plans, folders):
        same, own_bytes = {}, plan.size.bytes_on_disk
        for shard in plan.weights.shards if isinstance(plan.weights, Splice) else ():
            path = written.setdefault(shard.content, folder / shard.file_name)
            if path.parent != folder:
                same[shard.file_name] = path
                own_bytes -= shard.num_bytes
        num_bytes += 0 if folder in saved else own_bytes
        found.append(same)
    check_space(folders[0], num_bytes)
    return found


def _write_weights(model: PreTrainedModel, folder: Path, max_shard_bytes: int) -> None:
    if model.can_generate():  # the companions' is written, which may be refused here
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    (folder / "config.json").unlink()  # the companions' comes last


def warn_of_positions(family: Family, recipe: Recipe) -> None:
    """Warn if kinds of layers lie where software that goes by position does not expect them, and
    say which sizes have them where they belong.
    """
    if keeps_period(family.config(recipe)) or not keeps_period(family.configs["teacher"]):
        return
    ways = {"this order": family}
    with suppress(ValueError):  # no size keeps it, whatever the order
        order = whole_periods_order(family.layer_map, family.configs["teacher"])
        ways[f"--order {WHOLE_PERIODS}"] = family.with_order(order)
    sizes = {
        name: [k for k in range(len(along)) if keeps_period(along.config(along.recipe(k)))]
        for name, along in ways.items()
    }
    found = ", ".join(
        f"with {name} those of size k = {as_layer_list(ks)} do" for name, ks in sizes.items()
    )
    warnings.warn(
        "the layers of this model do not repeat in the teacher's pattern. transformers reads their "
        "kinds from config.json, but software that goes by position, such as llama.cpp and mlx-lm, "
        f"would run another model. Members that keep the pattern: {found}",
        stacklevel=3,
    )


def _check_range(model: PreTrainedModel, loaded: set[Parent]) -> None:
    """Raise OutOfRange if weights that were `loaded` in half precision were too large for it."""
    if loaded and model.dtype == torch.float16:
        for name, tensor in model.state_dict().items():
            if tensor.isinf().any():
                raise OutOfRange(name, model.dtype)


def plan_save(
    family: Family,
    patched_layers: frozenset[int],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SavePlan:
    """Plan the checkpoint of the member with these patched layers, in the family's dtype.

    `tokenizer` is written only if the teacher has no files of one, as a model in memory that does
    not say where it came from.

    Raises ValueError if the parents' weights are damaged, incomplete or disagree with their
    configs, if the tokenizer is missing, or if there is too little space for the weights in
    `folder`.
    """
    recipe = family.recipe(patched_layers=patched_layers)
    size = family.size(recipe, max_shard_bytes)
    check_space(folder, size.bytes_on_disk)
    reason = None
    parents = family.parents
    try:
        if in_memory := sorted(parents.given & recipe.parents):
            raise OtherLayout(f"the {in_memory[0]} is a model in memory")
        weights = plan_splice(
            recipe,
            family.configs,
            family.layouts,
            parents.references,
            family.dtype,
            max_shard_bytes,
        )
        model_class = weights.model_class
    except OtherLayout as error:
        reason = str(error)
        weights = assemble(recipe, **parents.load(recipe.parents))
        _check_range(weights, recipe.parents - parents.given)
        model_class = type(weights)
    warn_of_positions(family, recipe)
    companions = plan_companions(
        parents, family.config(recipe), model_class, family.dtype, tokenizer, recipe.parents
    )
    return SavePlan(
        family, patched_layers, recipe, size, companions, weights, reason, max_shard_bytes
    )
