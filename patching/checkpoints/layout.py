"""What checkpoints of an architecture hold, part by part, from its config alone.

Names on disk differ from names in memory: GPT-NeoX's head is `embed_out`, experts lie side by side,
old GPT-2 files lack a prefix. transformers knows all of it; here its own rules are applied to an
empty model.
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

from patching.architectures.lookup import architecture_of
from patching.architectures.models import empty_model
from patching.architectures.table import Architecture
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
"""torch's dtypes by safetensors' names of them."""


class Cost(NamedTuple):
    """What one part of a model costs."""

    parameters: int
    flops: int
    """For one token, in products with parameters: two for each, experts that are not asked left
    out.
    """


class SourcedTensor(NamedTuple):
    """A tensor of a checkpoint to be, and where its numbers come from."""

    tensor: StoredTensor
    parent: Parent
    parent_name: str


@dataclass(frozen=True)
class Layout:
    """The tensors of one parent's checkpoint, by the part of the model they belong to.

    Embedding and head are both counted in here; that a tied checkpoint holds one of them is `tied`.
    """

    model: PreTrainedModel
    """The empty model, its head not tied."""
    architecture: Architecture
    is_tied: bool

    @cached_property
    def parts(self) -> dict[int | str, list[StoredTensor]]:
        """Tensors as `save_pretrained` names them: `embedding`, each layer's position, `head`."""
        model = self.model
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [
            conversion for conversion in conversions if not isinstance(conversion, PrefixChange)
        ]
        parts: dict[int | str, list[StoredTensor]] = {"embedding": []}
        parts |= {position: [] for position in range(model.config.num_hidden_layers)}
        parts["head"] = []
        for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
            stored = StoredTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            parts[self.part_of(self.memory_name(name)[0])].append(stored)
        return parts

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
        """Parameters and operations of each part, embedding and head both counted."""
        costs = dict.fromkeys(self.parts, Cost(0, 0))
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            num_parameters, flops = costs[part]
            module = self.model.get_submodule(name.rpartition(".")[0])
            if parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
                share = 1.0
                if parameter.ndim == 3:  # experts, counted by the first dimension
                    share = self.model.config.num_experts_per_tok / parameter.shape[0]
                flops += round(2 * parameter.numel() * share)
            costs[part] = Cost(num_parameters + parameter.numel(), flops)
        return costs

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
        """The tensor in memory that a key of a checkpoint is loaded into, and whether it becomes
        only a part of it.

        The rules are those of `from_pretrained`.
        """
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, *self._conversions, prefix, self.memory)
        if name not in self.memory and key in self.memory:
            name, pattern = rename_source_key(key, [], [], prefix, self.memory)
        return name, pattern is not None

    @cached_property
    def tied_names(self) -> dict[str, str]:
        """Tensors of the head that a tied model takes from its embedding, both as stored."""
        tied = self.model._tied_weights_keys or {}
        stored = {self.memory_name(tensor.name)[0]: tensor.name for tensor in self.tensors}
        return {
            stored[head]: stored[embedding]
            for head, embedding in tied.items()
            if head in stored and embedding in stored
        }


def layout_of(
    config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> Layout:
    """The layout of a config's model in one dtype."""
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    model = empty_model(untied, dtype, trust_remote_code)
    return Layout(model, architecture_of(config), bool(config.tie_word_embeddings))


def tensors_of(recipe: Recipe, layouts: Mapping[Parent, Layout]) -> list[SourcedTensor]:
    """What the checkpoint of a recipe holds, in the sequence of the model."""
    embedding, head = layouts[recipe.embedding], layouts[recipe.head]
    is_tied = recipe.embedding == recipe.head and embedding.is_tied
    tensors = list(_sourced(embedding.parts["embedding"], recipe.embedding))
    for position, (parent, layer_idx) in enumerate(recipe.layers):
        for tensor in layouts[parent].parts[layer_idx]:
            name = renumbered(tensor.name, layer_idx, position)
            tensors.append(SourcedTensor(tensor._replace(name=name), parent, tensor.name))
    left_out = head.tied_names if is_tied else {}
    kept = [tensor for tensor in head.parts["head"] if tensor.name not in left_out]
    tensors += _sourced(kept, recipe.head)
    return tensors


def _sourced(tensors: Iterable[StoredTensor], parent: Parent) -> Iterator[SourcedTensor]:
    for tensor in tensors:
        yield SourcedTensor(tensor, parent, tensor.name)


def renumbered(name: str, old: int, new: int) -> str:
    """The name of a layer's tensor with the layer's number, which stands before any other,
    replaced.
    """
    before, _, behind = name.partition(f".{old}.")
    return f"{before}.{new}.{behind}"
