"""The tensors of a model's checkpoint, part by part, from its config alone.

Names on disk differ from names in memory: GPT-NeoX's head is `embed_out`, experts are stored one by
one, old GPT-2 files lack a prefix. Here transformers' own renaming rules are applied to an empty
model.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from patching.architectures.caches import LayerCache, layer_caches
from patching.architectures.checks import signature
from patching.architectures.config import untie
from patching.architectures.experts import expert_shares
from patching.architectures.lookup import architecture_of
from patching.architectures.models import empty_model
from patching.architectures.rescaling import Rescaling
from patching.architectures.table import PER_LAYER_LISTS, Architecture
from patching.checkpoints.file_sizes import TensorBytes
from patching.checkpoints.safetensors_files import StoredTensor
from patching.recipe import Parent, Recipe

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of torch's dtypes."""


class Cost(NamedTuple):
    """Parameters and FLOPs of one part of a model."""

    parameters: int
    active: int
    """Parameters that a token uses: all but experts that are not chosen."""
    flops: int
    """Per token: two for each active parameter that is multiplied."""


class SourcedTensor(NamedTuple):
    """A tensor of a planned checkpoint, and the parent's tensor that it is a copy of."""

    tensor: StoredTensor
    parent: Parent
    parent_name: str
    rescaling: Rescaling | None = None
    """What is done to the copy, if anything."""


@dataclass(frozen=True)
class Layout:
    """The tensors of one model's checkpoint, by the part of the model they belong to.

    Embedding and head are both included, even if they are tied (`is_tied`).
    """

    model: PreTrainedModel
    """The empty model, its head not tied."""
    architecture: Architecture
    is_tied: bool

    @cached_property
    def parts(self) -> dict[int | str, list[StoredTensor]]:
        """Tensors as `save_pretrained` names them, under `embedding`, each layer's position and
        `head`.
        """
        model = self.model
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [
            conversion for conversion in conversions if not isinstance(conversion, PrefixChange)
        ]
        parts: dict[int | str, list[StoredTensor]] = {"embedding": []}
        parts |= {position: [] for position in range(len(self.layers))}
        parts["head"] = []
        # Layers that are alike differ in their numbers alone, so one of each kind is converted.
        firsts = {None, *self.first_alike}
        once = {
            name: tensor
            for name, tensor in self.memory.items()
            if self.architecture.layer_of(name) in firsts
        }
        for name, tensor in revert_weight_conversion(model, once).items():
            stored = StoredTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            parts[self.part_of(self.memory_name(name)[0])].append(stored)
        for position, first in enumerate(self.first_alike):
            if position != first:
                parts[position] = [
                    tensor._replace(name=renumbered(tensor.name, first, position))
                    for tensor in parts[first]
                ]
        return parts

    @cached_property
    def first_alike(self) -> list[int]:
        """For each layer, the first one with the same modules, shapes and config entries. It may be
        the layer itself.
        """
        values = self.model.config.get_text_config().to_dict()
        lists = [values[name] for name in PER_LAYER_LISTS if values.get(name) is not None]
        firsts: dict[str, int] = {}
        return [
            firsts.setdefault(repr((signature(layer), [entry[i] for entry in lists])), i)
            for i, layer in enumerate(self.layers)
        ]

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.architecture.layers)

    @cached_property
    def caches(self) -> list[LayerCache] | None:
        """What each layer caches while the model generates. None if that is not known."""
        if self.architecture.predicts_masked_tokens:
            return [LayerCache(0, None, 0)] * len(self.layers)
        return layer_caches(self.model, self.layers, self.first_alike)

    @cached_property
    def bytes_of_parts(self) -> dict[int | str, TensorBytes]:
        """What the tensors of each part take in files."""
        firsts = ("embedding", *set(self.first_alike), "head")
        found = {part: TensorBytes.of(self.parts[part]) for part in firsts}
        for position, first in enumerate(self.first_alike):
            if position != first:
                found[position] = found[first].with_longer_names(digits(position) - digits(first))
        return found

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        for part in self.parts.values():
            yield from part

    def part_of(self, memory_name: str) -> int | str:
        position = self.architecture.layer_of(memory_name)
        if position is not None:
            return position
        return "head" if self.architecture.goes_with_head(memory_name) else "embedding"

    @cached_property
    def costs(self) -> dict[int | str, Cost]:
        """The cost of each part."""
        positions = range(len(self.layers))
        costs = dict.fromkeys(("embedding", *positions, "head"), Cost(0, 0, 0))
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            num_parameters, active, flops = costs[part]
            module_name = name.rpartition(".")[0]
            share = (self.expert_shares or {}).get(module_name)
            num_active = parameter.numel() if share is None else round(parameter.numel() * share)
            is_factor = parameter.ndim >= (2 if share is None else 3)
            if is_factor and not isinstance(self.model.get_submodule(module_name), nn.Embedding):
                flops += 2 * num_active
            costs[part] = Cost(num_parameters + parameter.numel(), active + num_active, flops)
        return costs

    @cached_property
    def expert_shares(self) -> dict[str, float] | None:
        """The shares of experts that a token uses. If None, `costs` count every expert."""
        return expert_shares(self.model)

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        conversions = get_model_conversion_mapping(self.model)
        return (
            [entry for entry in conversions if isinstance(entry, WeightRenaming)],
            [entry for entry in conversions if isinstance(entry, WeightConverter)],
        )

    @cached_property
    def memory(self) -> dict[str, torch.Tensor]:
        """The model's empty tensors by their names in memory."""
        return self.model.state_dict()

    def memory_name(self, key: str) -> tuple[str, bool]:
        """Return the name of the tensor that `from_pretrained` loads a checkpoint's key into, and
        whether the key is only a part of that tensor.
        """
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, *self._conversions, prefix, self.memory)
        if name not in self.memory and key in self.memory:
            name, pattern = rename_source_key(key, [], [], prefix, self.memory)
        return name, pattern is not None

    @cached_property
    def tied_names(self) -> dict[str, str]:
        """Stored names of the head's tensors that a tied model takes from its embedding, with the
        stored names of these.
        """
        tied = self.model._tied_weights_keys or {}
        outside = (*self.parts["embedding"], *self.parts["head"])
        stored = {self.memory_name(tensor.name)[0]: tensor.name for tensor in outside}
        return {
            stored[head]: stored[embedding]
            for head, embedding in tied.items()
            if head in stored and embedding in stored
        }


def layout_of(
    config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> Layout:
    """Return the layout of a config's model with all weights in `dtype`."""
    untied = copy.deepcopy(config)
    untie(untied)
    model = empty_model(untied, dtype, trust_remote_code)
    return Layout(model, architecture_of(config), bool(config.tie_word_embeddings))


def tensors_of(recipe: Recipe, layouts: Mapping[Parent, Layout]) -> list[SourcedTensor]:
    """Return the tensors of a recipe's checkpoint, in the sequence of the model."""
    embedding, head = layouts[recipe.embedding], layouts[recipe.head]
    is_tied = recipe.may_tie and embedding.is_tied
    architecture = embedding.architecture
    tensors = []
    for tensor in embedding.parts["embedding"]:
        memory_name, _ = embedding.memory_name(tensor.name)
        parent, _ = architecture.source_of(memory_name, recipe)
        rescaling = architecture.rescaling_of(memory_name, recipe)
        tensors.append(SourcedTensor(tensor, parent, tensor.name, rescaling))
    for position, (parent, layer_idx, scale) in enumerate(recipe.layers):
        for tensor in layouts[parent].parts[layer_idx]:
            name, rescaling = renumbered(tensor.name, layer_idx, position), None
            if scale != 1:
                memory_name, _ = layouts[parent].memory_name(tensor.name)
                memory_name = renumbered(memory_name, layer_idx, position)
                rescaling = architecture.rescaling_of(memory_name, recipe)
            copied = tensor._replace(name=name)
            tensors.append(SourcedTensor(copied, parent, tensor.name, rescaling))
    tensors += _sourced(head_tensors(head, is_tied), recipe.head)
    return tensors


def head_tensors(layout: Layout, is_tied: bool) -> list[StoredTensor]:
    """Return what is stored of a model's head, which is less if it is tied to the embedding."""
    left_out = layout.tied_names if is_tied else {}
    return [tensor for tensor in layout.parts["head"] if tensor.name not in left_out]


def bytes_of(recipe: Recipe, layouts: Mapping[Parent, Layout]) -> TensorBytes:
    """Return what the tensors of a recipe's checkpoint take in files: those of `tensors_of`, in the
    same sequence.
    """
    embedding, head = layouts[recipe.embedding], layouts[recipe.head]
    is_tied = recipe.may_tie and embedding.is_tied
    parts = [embedding.bytes_of_parts["embedding"]]
    for position, (parent, layer_idx, _) in enumerate(recipe.layers):
        part = layouts[parent].bytes_of_parts[layer_idx]
        parts.append(part.with_longer_names(digits(position) - digits(layer_idx)))
    parts.append(TensorBytes.of(head_tensors(head, is_tied)))
    return TensorBytes.joined(parts)


def digits(number: int) -> int:
    return len(str(number))


def _sourced(tensors: Iterable[StoredTensor], parent: Parent) -> Iterator[SourcedTensor]:
    for tensor in tensors:
        yield SourcedTensor(tensor, parent, tensor.name)


def renumbered(name: str, old: int, new: int) -> str:
    """Return the name of a layer's tensor with the layer's number replaced, the first in the
    name.
    """
    before, _, after = name.partition(f".{old}.")
    return f"{before}.{new}.{after}"
