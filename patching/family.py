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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from patching.architectures.checks import check_parents_match
from patching.architectures.config import config_for
from patching.architectures.distilbert import as_bert
from patching.architectures.lookup import architecture_of, read_config
from patching.architectures.models import load_model, predicts_masked_tokens
from patching.assemble import assemble
from patching.blocks import LayerMap, Order, as_layer_list
from patching.checkpoints.fingerprint import fingerprint
from patching.checkpoints.layout import Layout, layout_of
from patching.checkpoints.sizes import Size, deepest_that_fits, size_of
from patching.patch_order import read_order, recommended_order
from patching.recipe import Parent, Recipe, Reference, naively_pruned, patched_model
from patching.student_config import FILE_NAME, StudentConfig, read_student_config

DTYPES = ("auto", "bfloat16", "float16", "float32")
MAX_SHARD_BYTES = 5 * 10**9
"""Largest weights file unless the caller says otherwise, as in transformers."""

Model = str | os.PathLike[str] | PreTrainedModel
"""A folder, a hub repository, or a model in memory."""


class Member(NamedTuple):
    """One size of a family."""

    num_layers_to_patch: int
    recipe: Recipe
    model: PreTrainedModel


@dataclass(frozen=True)
class Weights:
    """The parents as models: those in memory, and how the others are loaded."""

    references: dict[Parent, Reference]
    """Where each parent came from. The name is empty for a model in memory that does not say."""
    dtype: torch.dtype
    device: torch.device
    device_map: str | Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    models: dict[Parent, PreTrainedModel] = field(default_factory=dict)
    """Parents in memory: those the caller gave, and those that `load` has read since."""
    given: frozenset[Parent] = frozenset()
    """Parents that the caller gave as models, which `release` leaves alone."""

    def load(self, parents: Collection[Parent]) -> dict[Parent, PreTrainedModel]:
        """The named parents, all in one dtype. Each is read once and kept.

        Raises ValueError if weights are damaged or incomplete, or if a model given in memory has
        another dtype.
        """
        for parent in sorted(parents):
            if parent not in self.models:
                model = load_model(
                    self.references[parent],
                    self.dtype,
                    self.trust_remote_code,
                    self.attn_implementation,
                    self.device_map,
                )
                self.models[parent] = model if self.device_map else model.to(self.device)
            elif self.models[parent].dtype != self.dtype:
                raise ValueError(
                    f"the {parent} is in memory in {self.models[parent].dtype}, and {self.dtype} "
                    "is asked for: load both models in one dtype"
                )
        return {parent: self.models[parent] for parent in sorted(parents)}

    def release(self) -> None:
        """Let go of the weights that `load` has read; models given in memory stay."""
        for parent in self.models.keys() - self.given:
            del self.models[parent]


@dataclass(frozen=True)
class Family:
    """A checked teacher and student, their layer map and the order in which layers are patched.

    `family[k]` is the member of size k, `len(family)` the number of sizes, and iteration runs from
    the student (k = 0) to the teacher.
    """

    configs: dict[Parent, PreTrainedConfig]
    layer_map: LayerMap
    order: Order
    weights: Weights

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
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Family":
        """Open the family of a teacher and a student, each a name, a folder or a model in memory.

        `order` is `last`, `first`, a list of student layers or a JSON file with one, such as
        order.json. If None, it is the order recorded in student_config.json, or else the one the
        paper recommends for the architecture. `revision` and `student_revision` are branches, tags
        or commits on the hub. `student_config` or `kept_layers` replaces student_config.json.
        `dtype` "auto" is the teacher's. A parent given as a name is loaded onto `device`, by
        default the device of the other parent if that one is in memory, else the CPU; `device_map`
        places it as in transformers.

        Raises ValueError or OSError, before any weights load, if a file is missing, the
        architecture cannot be cut and joined, the two models do not fit together, or one is wrapped
        (PEFT, DDP, torch.compile).
        """
        models = {
            parent: as_bert(plain_model(parent, model))
            for parent, model in (("teacher", teacher), ("student", student))
            if isinstance(model, nn.Module)
        }
        references: dict[Parent, Reference] = {
            "teacher": Reference(_name_of(teacher), revision),
            "student": Reference(_name_of(student), student_revision),
        }
        configs = {
            parent: _config_of(parent, references[parent], models.get(parent), trust_remote_code)
            for parent in references
        }
        check_parents_match(configs["student"], configs["teacher"])
        if student_config is None or kept_layers is not None:
            student_config = _student_config(
                references["student"], configs, kept_layers, student_config
            )
        _check_depths(configs, student_config.layer_map, kept_layers)
        if order is None:
            recommended = recommended_order(configs["teacher"].model_type)
            order = student_config.patch_order or recommended
        layer_order, searched_for = read_order(order)
        student_config.layer_map.sequence(layer_order)  # raises for an order of other layers
        weights = Weights(
            references,
            _dtype_of(dtype, configs["teacher"], models.get("teacher")),
            _device_of(device, models),
            device_map,
            attn_implementation,
            trust_remote_code,
            models,
            frozenset(models),
        )
        family = cls(configs, student_config.layer_map, layer_order, weights)
        _check_order_belongs_to(family, order, searched_for)
        return family

    @property
    def max_layers_to_patch(self) -> int:
        """The size k at which the member is the teacher."""
        return self.layer_map.max_layers_to_patch

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def identity(self) -> dict[str, Any]:
        """What a searched order belongs to: the layer map, and under `teacher` and `student` a
        fingerprint of the weights.
        """
        return {
            "model_type": self.configs["teacher"].model_type,
            "num_teacher_layers": self.layer_map.num_teacher_layers,
            "kept_layers": list(self.layer_map.kept),
            **{p: self.fingerprint(p) for p in sorted(self.configs)},
        }

    def fingerprint(self, parent: Parent) -> str:
        return fingerprint(self.weights.references[parent].name_or_path, self.configs[parent])

    # Sizes and recipes: from configs alone

    def patched_layers(self, num_layers_to_patch: int | None = None, **size: Any) -> frozenset[int]:
        """The student layers replaced by their teacher blocks in one member; `size` may name it in
        another way, see `layers_of_size`.
        """
        return layers_of_size(self, num_layers_to_patch, **size)

    def recipe(self, num_layers_to_patch: int | None = None, **size: Any) -> Recipe:
        """The recipe of one member; sizes are named as in `patched_layers`."""
        return patched_model(self.layer_map, self.patched_layers(num_layers_to_patch, **size))

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
            parent: layout_of(config, self.dtype, self.weights.trust_remote_code)
            for parent, config in self.configs.items()
        }

    def size(self, recipe: Recipe, max_shard_bytes: int = MAX_SHARD_BYTES) -> Size:
        """Parameters, bytes and FLOPs of a recipe's model, saved in the family's dtype."""
        return size_of(recipe, self.layouts, self.dtype, max_shard_bytes)

    def sizes(self, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Size]:
        """The size of each member, k = 0 first."""
        return [self.size(self.recipe(k), max_shard_bytes) for k in range(len(self))]

    # Models

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer with a padding token. It pads on the left, as batched generation
        needs, unless the family is of encoders.

        Raises ValueError for a teacher in memory that does not say where it came from.
        """
        name_or_path, revision = self.weights.references["teacher"]
        if not name_or_path:
            raise ValueError(
                "the teacher in memory does not say where it came from: give its tokenizer too"
            )
        generates = not predicts_masked_tokens(self.configs["teacher"])
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path,
            revision=revision,
            trust_remote_code=self.weights.trust_remote_code,
            **({"padding_side": "left"} if generates else {}),
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self, num_layers_to_patch: int | None = None, **size: Any) -> PreTrainedModel:
        """One member in eval mode, sharing its tensors with the parents; sizes are named as in
        `patched_layers`.
        """
        recipe = self.recipe(num_layers_to_patch, **size)
        return assemble(recipe, **self.weights.load(recipe.parents))

    def with_order(self, order: Order) -> "Family":
        """The same family patched in another order, sharing the weights loaded so far."""
        self.layer_map.sequence(order)
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


def layers_of_size(
    family: Family,
    num_layers_to_patch: int | None = None,
    *,
    patched_layers: Collection[int] | None = None,
    target_params: int | None = None,
    target_bytes: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> frozenset[int]:
    """The patched student layers of the one member named, in one of four ways.

    `num_layers_to_patch` is k along the family's order, `patched_layers` any set of student layers,
    `target_params` asks for the deepest member with at most that many stored parameters, and
    `target_bytes` for the deepest one whose weights files fit, in files of `max_shard_bytes`.

    Raises ValueError unless exactly one way is given and it names a member of this family.
    """
    ways = {
        "num_layers_to_patch": num_layers_to_patch,
        "patched_layers": patched_layers,
        "target_params": target_params,
        "target_bytes": target_bytes,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"name one size with one of {', '.join(ways)}, not {len(given)} of them")
    if patched_layers is not None:
        family.layer_map.num_patched(frozenset(patched_layers))  # raises for unknown layers
        return frozenset(patched_layers)
    k = num_layers_to_patch
    if target_params is not None:
        params = [size.parameters.stored for size in family.sizes(max_shard_bytes)]
        k = deepest_that_fits(params, target_params, "target_params", "parameters")
    elif target_bytes is not None:
        num_bytes = [size.bytes_on_disk for size in family.sizes(max_shard_bytes)]
        k = deepest_that_fits(num_bytes, target_bytes, "target_bytes", "bytes")
    return family.layer_map.patched_layers(k, family.order)


def plain_model(parent: Parent, model: nn.Module) -> PreTrainedModel:
    """The model as given. Raises ValueError for one that is wrapped, sharded or has adapters."""
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"the {parent} has PEFT adapters: merge them first, or call delete_adapter"
            )
        if kind.startswith("FSDP"):
            raise ValueError(f"the {parent} is sharded ({kind}): save it and name the folder")
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"the {parent} is a {kind}, which has no language modeling head: load it with "
                "AutoModelForCausalLM, or AutoModelForMaskedLM for an encoder"
            )
        return model
    remedies = {
        "OptimizedModule": "give the model that torch.compile was called on",
        "DistributedDataParallel": "give its .module",
    }
    remedy = remedies.get(kind, "give the PreTrainedModel inside it")
    if "Peft" in kind:
        remedy = "give its merge_and_unload()"
    raise ValueError(f"the {parent} is a {kind}, not a transformers model: {remedy}")


def usable_device(name: str | None) -> torch.device:
    """The named device, by default the accelerator if there is one. Raises ValueError if this
    machine does not have it.
    """
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here: {reason}") from error


def _name_of(model: Model) -> str:
    return model.name_or_path if isinstance(model, PreTrainedModel) else os.fspath(model)


def _config_of(
    parent: Parent,
    reference: Reference,
    model: PreTrainedModel | None,
    trust_remote_code: bool,
) -> PreTrainedConfig:
    if model is None:
        return read_config(parent, *reference, trust_remote_code)
    architecture_of(model.config, trust_remote_code)  # raises for one that is not supported
    return model.config


def _student_config(
    student: Reference,
    configs: Mapping[Parent, PreTrainedConfig],
    kept_layers: Sequence[int] | None,
    student_config: StudentConfig | None,
) -> StudentConfig:
    """The student's layers as the caller names them, else as the student itself does."""
    if kept_layers is not None:
        if student_config is not None:
            raise ValueError("student_config and kept_layers both name layers: give one of them")
        num_teacher_layers = configs["teacher"].num_hidden_layers
        return StudentConfig(LayerMap(tuple(kept_layers), num_teacher_layers))
    if not student.name_or_path:
        raise ValueError(
            "the student in memory does not say where it came from: give kept_layers, or "
            "student_config=StudentConfig(LayerMap(kept_layers, num_teacher_layers))"
        )
    return read_student_config(*student)


def _check_depths(
    configs: Mapping[Parent, PreTrainedConfig],
    layer_map: LayerMap,
    kept_layers: Sequence[int] | None,
) -> None:
    """Raise ValueError if the parents' depths are not those of the layer map."""
    depths = {"student": len(layer_map.kept), "teacher": layer_map.num_teacher_layers}
    for parent, depth in depths.items():
        if configs[parent].num_hidden_layers != depth:
            where = FILE_NAME
            if kept_layers is not None:
                where = f"kept_layers={as_layer_list(kept_layers)}"
            raise ValueError(
                f"the {parent} has {configs[parent].num_hidden_layers} layers and {where} names "
                f"{depth}: this student was not made from this teacher"
            )


def _check_order_belongs_to(
    family: Family, order_file: object, searched_for: Mapping[str, Any]
) -> None:
    """Raise ValueError if an order was searched for different layers. Different weights only warn:
    the order still names the right layers, but a search might find another.
    """
    if not searched_for:
        return
    for name, own in family.identity.items():
        other = searched_for.get(name, own)
        found = f"order={order_file} was found for {name}={other}"
        if name not in ("teacher", "student"):
            if other != own:
                raise ValueError(
                    f"{found} and this family has {own}: search one for it with patching.orders"
                )
        elif str(other).split()[-1:] != own.split()[-1:]:  # a folder may be renamed
            warnings.warn(f"{found}, and this one is {own}", stacklevel=3)


def _dtype_of(
    name: str | torch.dtype, teacher: PreTrainedConfig, in_memory: PreTrainedModel | None
) -> torch.dtype:
    """`auto` is the teacher's dtype, float32 if its config names none."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype={name}: choose one of {', '.join(DTYPES)}")
    if name != "auto":
        return getattr(torch, name)
    if in_memory is not None:
        return in_memory.dtype
    return teacher.dtype or torch.float32


def _device_of(
    device: str | torch.device | None, models: Mapping[Parent, PreTrainedModel]
) -> torch.device:
    """The device asked for, else that of the models in memory, else the CPU."""
    places = {model.device for model in models.values()}
    if device is not None:
        places.add(torch.empty(0, device=device).device)
    if len(places) > 1:
        raise ValueError(
            f"teacher and student are on {' and '.join(sorted(map(str, places)))}: move both to "
            "one device"
        )
    return places.pop() if places else torch.device("cpu")
