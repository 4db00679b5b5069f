"""How large each member of a family is, from configs alone, and which member fits a limit.

Stored sizes do not grow with depth throughout: where embedding and head come from different models
they are stored twice. So a limit is held against every member.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from patching.architectures.models import predicts_masked_tokens
from patching.assemble import ParameterCount
from patching.checkpoints.layout import Layout, tensors_of
from patching.checkpoints.splice import bytes_of_files, plan_files
from patching.recipe import Parent, Recipe

CACHED_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as `layer_types` has them, that keep a key and a value of each token."""


@dataclass(frozen=True)
class Size:
    """What a model costs to store and to run."""

    depth: int
    parameters: ParameterCount
    bytes_on_disk: int
    """All weights files in the chosen dtype, headers included."""
    kv_cache_bytes_per_token: int | None
    """Over all layers in the chosen dtype; a sliding layer's share stops growing at its window.
    None where keys and values are not kept as they are, or not at all.
    """
    flops_per_token: int
    """Forward pass, two for each multiplied parameter, experts that are not asked left out; without
    attention's own products, which grow with the text."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"parameters": self.parameters._asdict()}


def size_of(
    recipe: Recipe, layouts: Mapping[Parent, Layout], dtype: torch.dtype, max_shard_bytes: int
) -> Size:
    """The size of a recipe's model; `layouts` are its parents' in `dtype`."""
    embedding, head = layouts[recipe.embedding], layouts[recipe.head]
    parts = [(embedding, "embedding"), (head, "head")]
    parts += [(layouts[parent], layer_idx) for parent, layer_idx in recipe.layers]
    both = sum(layout.costs[part].parameters for layout, part in parts)
    again = 0
    if recipe.embedding == recipe.head and embedding.is_tied:
        tied = {head.memory_name(name)[0] for name in head.tied_names}
        again = sum(head.memory[name].numel() for name in tied)
    files = plan_files([tensor for tensor, *_ in tensors_of(recipe, layouts)], max_shard_bytes)
    cached = [
        cached_numbers(layouts[parent].model.config, layer_idx)
        for parent, layer_idx in recipe.layers
    ]
    return Size(
        depth=recipe.depth,
        parameters=ParameterCount(both - again, both),
        bytes_on_disk=bytes_of_files(files),
        kv_cache_bytes_per_token=None if None in cached else sum(cached) * dtype.itemsize,
        flops_per_token=sum(layout.costs[part].flops for layout, part in parts),
    )


def cached_numbers(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """Numbers a layer's key-value cache holds of a token, None where it holds something else or
    there is none.
    """
    if predicts_masked_tokens(config):
        return None
    values = config.to_dict()
    if values.get("kv_lora_rank") is not None:
        return None
    kinds = values.get("layer_types")
    if kinds is not None and kinds[layer_idx] not in CACHED_KINDS:
        return None
    num_heads = values.get("num_key_value_heads") or config.num_attention_heads
    head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * num_heads * head_dim


def deepest_that_fits(costs: Sequence[int], limit: int, name: str, unit: str) -> int:
    """Index of the deepest member that costs at most `limit`, with members in order of depth.

    Raises ValueError, with the name of the limit and the smallest cost, if none does.
    """
    fitting = [k for k, cost in enumerate(costs) if cost <= limit]
    if not fitting:
        raise ValueError(
            f"{name}={limit:,}: no member of this family fits, the smallest takes "
            f"{min(costs):,} {unit}"
        )
    return fitting[-1]
