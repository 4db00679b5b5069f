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
"""safetensors' names of torch's dtypes."""


class Cost(NamedTuple):
    """Parameters and FLOPs of one part of a model."""

    parameters: int
    flops: int
    """Per token: two for each parameter that is multiplied, without experts that are not chosen."""


class SourcedTensor(NamedTuple):
    """A tensor of a planned checkpoint, and the parent's tensor that it is a copy of."""

    tensor: StoredTensor
    parent: Parent
    parent_name: str


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
        """The cost of each part."""
        costs = dict.fromkeys(self.parts, Cost(0, 0))
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            num_parameters, flops = costs[part]
            module = self.model.get_submodule(name.rpartition(".")[0])
            if parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
                share = 1.0
                if parameter.ndim == 3:  # the first dimension is the expert
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
        stored = {self.memory_name(tensor.name)[0]: tensor.name for tensor in self.tensors}
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
    untied.tie_word_embeddings = False
    model = empty_model(untied, dtype, trust_remote_code)
    return Layout(model, architecture_of(config), bool(config.tie_word_embeddings))


def tensors_of(recipe: Recipe, layouts: Mapping[Parent, Layout]) -> list[SourcedTensor]:
    """Return the tensors of a recipe's checkpoint, in the sequence of the model."""
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
    """Return the name of a layer's tensor with the layer's number replaced, the first in the
    name.
    """
    before, _, after = name.partition(f".{old}.")
    return f"{before}.{new}.{after}"
