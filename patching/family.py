"""A teacher and its student as one family: every size between them, from names or from models.

    family = Family.from_pretrained("Qwen/Qwen3-4B-Base", "Harvard-DCML/boomerang-qwen3-2.3B")
    family.recipe(4)             # which layer of which model goes where
    family.model(4)              # the model itself, in memory
    for member in family: ...    # every size, sharing one copy of both models' weights

Opening a family reads and checks configs only. Weights are loaded when the first model is asked
for.
"""

import dataclasses
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from patching.architectures.checks import check_parents_match
from patching.architectures.config import config_for
from patching.architectures.layer_pattern import whole_periods_order
from patching.architectures.lookup import check_builds
from patching.assemble import assemble
from patching.blocks import LayerMap, Order, as_layer_list
from patching.checkpoints.companions import set_generation_config
from patching.checkpoints.layout import Layout, layout_of
from patching.checkpoints.sizes import LIMITS, Size, check_cached_text, deepest_within, size_of
from patching.matched_scale import MatchedScales
from patching.parents import Model, Parents
from patching.patch_order import WHOLE_PERIODS, read_order, recommended_order
from patching.recipe import Parent, Recipe, naively_pruned, patched_model, with_scales
from patching.running.placement import dispatch
from patching.running.rescaled import check_rescaling
from patching.student_config import FILE_NAME, StudentConfig, read_student_config

MAX_SHARD_BYTES = 5 * 10**9
"""Largest weights file unless the caller says otherwise, as in transformers."""


class Member(NamedTuple):
    """One size of a family."""

    num_layers_to_patch: int
    recipe: Recipe
    model: PreTrainedModel


@dataclass(frozen=True)
class Family:
    """A checked teacher and student, their layer map, the order of patching, and measured factors.

    `family[k]` is the member of size k, `len(family)` the number of sizes, and iteration runs from
    the student (k = 0) to the teacher.
    """

    parents: Parents
    layer_map: LayerMap
    order: Order
    scales: MatchedScales | None = None
    """None if no layer is rescaled."""

    @classmethod
    def from_pretrained(
        cls,
        teacher: Model,
        student: Model,
        order: Order | Sequence[int] | str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        student_revision: str | None = None,
        student_config: StudentConfig | None = None,
        kept_layers: Sequence[int] | None = None,
        match_scale: bool = True,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Family":
        """Open the family of a teacher and a student, each a name, a folder or a model in memory.

        `order` is `last`, `first`, `whole_periods`, a list of student layers or a JSON file with
        one, such as order.json. If None, it is the order recorded in student_config.json, or else
        the one recommended for the architecture. `revision` and `student_revision` are branches,
        tags or commits on the hub. `student_config` or `kept_layers` replaces student_config.json.
        With `match_scale`, student layers are rescaled in members for which factors were measured:
        those in the file of the order, else in student_config.json. `dtype` "auto" is the
        teacher's. A parent given as a name is loaded onto `device`, by default the device of the
        other parent if that one is in memory, else the CPU; `device_map` places it as in
        transformers.

        Raises ValueError or OSError, before any weights load, if a file is missing, the
        architecture cannot be cut and joined, the two models do not fit together, or one is wrapped
        (PEFT, DDP, torch.compile).
        """
        parents = Parents.from_pretrained(
            {"teacher": teacher, "student": student},
            {"teacher": revision, "student": student_revision},
            dtype,
            device,
            device_map,
            attn_implementation,
            trust_remote_code,
        )
        _check_parents(parents)
        student_config = _student_config(parents, kept_layers, student_config)
        if order is None:
            order = student_config.patch_order
        if order is None:
            order = recommended_order(parents.configs["teacher"].model_type)
        family = cls(parents, student_config.layer_map, "last", student_config.scales)
        family = _with_order_from(order, family)
        if match_scale:
            _check_scales(family)
            return family
        return dataclasses.replace(family, scales=None)

    @property
    def configs(self) -> dict[Parent, PreTrainedConfig]:
        return self.parents.configs

    @property
    def dtype(self) -> torch.dtype:
        return self.parents.dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, see `Parents.tokenizer`."""
        return self.parents.tokenizer

    @property
    def max_layers_to_patch(self) -> int:
        """The size k at which the member is the teacher."""
        return self.layer_map.max_layers_to_patch

    def patched_layers(self, num_layers_to_patch: int | None = None, **size: Any) -> frozenset[int]:
        """The student layers replaced by their teacher blocks in one member; `size` may name it in
        another way, see `layers_of_size`.
        """
        return layers_of_size(self, num_layers_to_patch, **size)

    def recipe(self, num_layers_to_patch: int | None = None, **size: Any) -> Recipe:
        """The recipe of one member; sizes are named as in `patched_layers`."""
        patched = self.patched_layers(num_layers_to_patch, **size)
        recipe = patched_model(self.layer_map, patched)
        return recipe if self.scales is None else with_scales(recipe, self.scales.factors(patched))

    def naive_recipe(self, num_layers_to_patch: int) -> Recipe:
        """The teacher pruned to the depth of size k, without distillation."""
        return naively_pruned(self.layer_map, self.recipe(num_layers_to_patch))

    def config(self, recipe: Recipe) -> PreTrainedConfig:
        """The config of the model a recipe makes."""
        return config_for(recipe, self.configs)

    @cached_property
    def layouts(self) -> dict[Parent, Layout]:
        """What each parent's checkpoint holds, in the family's dtype."""
        return {
            parent: layout_of(config, self.dtype, self.parents.trust_remote_code)
            for parent, config in self.configs.items()
        }

    def size(self, recipe: Recipe, max_shard_bytes: int = MAX_SHARD_BYTES) -> Size:
        """Parameters, bytes and FLOPs of a recipe's model, saved in the family's dtype."""
        return size_of(recipe, self.layouts, max_shard_bytes)

    def sizes(self, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Size]:
        """The size of each member, k = 0 first."""
        return [self.size(self.recipe(k), max_shard_bytes) for k in range(len(self))]

    def model(self, num_layers_to_patch: int | None = None, **size: Any) -> PreTrainedModel:
        """One member in eval mode, sharing its tensors with the parents; sizes are named as in
        `patched_layers`.
        """
        recipe = self.recipe(num_layers_to_patch, **size)
        model = assemble(recipe, **self.parents.load(recipe.parents))
        set_generation_config(model, self.parents)
        return dispatch(model) if self.parents.device_map else model

    def with_order(self, order: Order) -> "Family":
        """The same family patched in another order, sharing the weights loaded so far."""
        self.layer_map.sequence(order)  # raises for an order of other layers
        return dataclasses.replace(self, order=order)

    def __len__(self) -> int:
        return self.max_layers_to_patch + 1

    def __getitem__(self, num_layers_to_patch: int) -> Member:
        if not -len(self) <= num_layers_to_patch < len(self):
            raise IndexError(
                f"size {num_layers_to_patch}: this family has sizes 0-{self.max_layers_to_patch}"
            )
        k = num_layers_to_patch % len(self)
        return Member(k, self.recipe(k), self.model(k))

    def __iter__(self) -> Iterator[Member]:
        return (self[k] for k in range(len(self)))


def identity_of(family: Family) -> dict[str, Any]:
    """What a searched order belongs to: the layer map, and under `teacher` and `student` a
    fingerprint of the weights.
    """
    return {
        "model_type": family.configs["teacher"].model_type,
        "num_teacher_layers": family.layer_map.num_teacher_layers,
        "kept_layers": list(family.layer_map.kept),
        **{parent: family.parents.fingerprint(parent) for parent in sorted(family.configs)},
    }


def layers_of_size(
    family: Family,
    num_layers_to_patch: int | None = None,
    *,
    patched_layers: Collection[int] | None = None,
    context: int | None = None,
    batch: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **limits: int | None,
) -> frozenset[int]:
    """The patched student layers of the one member named, in one of several ways.

    `num_layers_to_patch` is k along the family's order, and `patched_layers` any set of student
    layers. The other ways are limits and ask for the deepest member within: `target_params` counts
    stored parameters, `target_active_params` those a token uses, `target_bytes` the weights files
    (of at most `max_shard_bytes`), and `target_memory` the weights and the cache of `batch` texts
    of `context` tokens.

    Raises ValueError unless exactly one way is given and it names a member of this family.
    """
    if unknown := sorted(limits.keys() - LIMITS):
        raise TypeError(f"{unknown[0]} does not name a size: choose from {', '.join(LIMITS)}")
    ways = {"num_layers_to_patch": num_layers_to_patch, "patched_layers": patched_layers} | limits
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(("num_layers_to_patch", "patched_layers", *LIMITS))
        raise ValueError(f"name one size with one of {names}, not {len(given)} of them")
    (name,) = given
    if context is not None and name != "target_memory":
        raise ValueError("context belongs to target_memory")
    if patched_layers is not None:
        family.layer_map.num_patched(frozenset(patched_layers))  # raises for unknown layers
        return frozenset(patched_layers)
    k = num_layers_to_patch
    if name in LIMITS:
        cached = ()
        if name == "target_memory":
            check_cached_text(family.configs["teacher"], context, batch)
            cached = (context, batch)
        k = deepest_within(family.sizes(max_shard_bytes), name, limits[name], *cached)
    return family.layer_map.patched_layers(k, family.order)


def _check_parents(parents: Parents) -> None:
    """Raise ValueError unless both configs fit together and those that were read are of models."""
    check_parents_match(parents.configs["student"], parents.configs["teacher"])
    for parent in [parent for parent in parents.configs if parent not in parents.given]:
        name = parents.references[parent].name_or_path
        flag = f"{parent}_model_name_or_path"
        check_builds(flag, name, parents.configs[parent], parents.trust_remote_code)


def _student_config(
    parents: Parents, kept_layers: Sequence[int] | None, student_config: StudentConfig | None
) -> StudentConfig:
    """The student's layers as the caller names them, else as the student itself does.

    Raises ValueError if the parents have other depths than these layers say.
    """
    where = FILE_NAME
    if kept_layers is not None:
        if student_config is not None:
            raise ValueError("student_config and kept_layers both name layers: give one of them")
        where = f"kept_layers={as_layer_list(kept_layers)}"
        num_layers = parents.configs["teacher"].get_text_config().num_hidden_layers
        layer_map = LayerMap(tuple(kept_layers), num_layers)
        student_config = StudentConfig(layer_map)
    elif student_config is None:
        student = parents.references["student"]
        if not student.name_or_path:
            raise ValueError(
                "the student in memory does not say where it came from: give kept_layers, or "
                "student_config=StudentConfig(LayerMap(kept_layers, num_teacher_layers))"
            )
        student_config = read_student_config(*student)
    layer_map = student_config.layer_map
    depths = {"student": len(layer_map.kept), "teacher": layer_map.num_teacher_layers}
    for parent, depth in depths.items():
        num_layers = parents.configs[parent].get_text_config().num_hidden_layers
        if num_layers != depth:
            raise ValueError(
                f"the {parent} has {num_layers} layers and {where} "
                f"names {depth}: this student was not made from this teacher"
            )
    return student_config


def _with_order_from(source: object, family: Family) -> Family:
    """The family in the order that a name, a list or a file says.

    Raises ValueError if the order is for different layers. One that was searched with different
    weights only warns: it names the right layers, but a search might find another.
    """
    if source == WHOLE_PERIODS:
        return family.with_order(whole_periods_order(family.layer_map, family.configs["teacher"]))
    order, searched_for, scales = read_order(source)
    family = family.with_order(order)
    if scales is not None:
        family = dataclasses.replace(family, scales=scales.before(family.scales))
    if not searched_for:
        return family
    for name, own in identity_of(family).items():
        other = searched_for.get(name, own)
        found = f"order={source} was found for {name}={other}"
        if name not in ("teacher", "student"):
            if other != own:
                raise ValueError(
                    f"{found} and this family has {own}: search one for it with patching.orders"
                )
        elif str(other).split()[-1:] != own.split()[-1:]:  # a folder may be renamed
            warnings.warn(f"{found}, and this one is {own}", stacklevel=3)
    return family


def _check_scales(family: Family) -> None:
    """Raise ValueError if factors are for sets of layers that this student does not have, or if its
    architecture cannot be rescaled.
    """
    for patched, found in family.scales.sets.items() if family.scales else ():
        family.layer_map.num_patched(patched)  # raises for unknown layers
        with_scales(patched_model(family.layer_map, patched), found.factors)
    if family.scales is not None and any(map(family.scales.factors, family.scales.sets)):
        check_rescaling(family.configs["teacher"], family.parents.trust_remote_code)
