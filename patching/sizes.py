"""How large each member of a family is, from configs alone, and which member fits a limit.

Stored sizes do not grow with depth throughout: where embedding and head come from different models
they are stored twice. So a limit is held against every member.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from patching.assemble import ParameterCount
from patching.auto_class import predicts_masked_tokens
from patching.layout import Layout, tensors_of
from patching.recipe import Parent, Recipe
from patching.splice import plan_files, weights_bytes

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
        bytes_on_disk=weights_bytes(files),
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


def deepest_that_fits(
    sizes: Sequence[Size], measure: Callable[[Size], int], limit: int, flag: str, unit: str
) -> int:
    """Index of the deepest member whose measure is at most `limit`, every member looked at.

    Raises ValueError, naming the flag and the smallest member's measure, where none is.
    """
    fitting = [i for i, size in enumerate(sizes) if measure(size) <= limit]
    if not fitting:
        smallest = min(map(measure, sizes))
        raise ValueError(
            f"{flag}: no member of this family fits, the smallest takes {smallest:,}{unit}"
        )
    return max(fitting, key=lambda i: sizes[i].depth)


PREFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_PREFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str, name: str) -> int:
    """Bytes from `6GB` (10^9 each), `6GiB` (2^30 each) or a plain number; `name` is the flag, for
    the message.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(?:([KMGT]?)(i?)B)?", text.strip(), re.IGNORECASE)
    if found:
        number, prefix, binary = found[1], (found[2] or "").upper(), found[3]
        if not binary or prefix:
            factors = BINARY_PREFIXES if binary else PREFIXES
            num_bytes = int(float(number) * factors[prefix])
            if num_bytes > 0:
                return num_bytes
    raise ValueError(f"{name}={text}: write a size such as 500MB, 6GB or 6GiB")


COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, name: str) -> int:
    """A number of parameters from `3.1B`, `350M` or digits alone; `name` is the flag, for the
    message.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    if found and (count := int(float(found[1]) * COUNT_SUFFIXES[found[2].upper()])) > 0:
        return count
    raise ValueError(f"{name}={text}: write a number of parameters such as 350M or 3.1B")


def table(sizes: Sequence[Size]) -> str:
    """The sizes of a family as text, k = 0 first."""
    rows = [
        ("k", "layers", "parameters", "stored", "on disk", "KV cache per token", "FLOPs per token")
    ]
    for k, size in enumerate(sizes):
        rows.append(
            (
                str(k),
                str(size.depth),
                count_text(size.parameters.both_counted),
                count_text(size.parameters.stored),
                bytes_text(size.bytes_on_disk),
                bytes_text(size.kv_cache_bytes_per_token),
                count_text(size.flops_per_token),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows
    )


def count_text(count: int) -> str:
    """A count for a person: `4.02 B`, `135.27 M`."""
    return _scaled(count, {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3})


def bytes_text(num_bytes: int | None) -> str:
    """Bytes for a person, decimal: `8.05 GB`; `-` for None."""
    if num_bytes is None:
        return "-"
    return _scaled(num_bytes, {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1})


def _scaled(value: int, units: dict[str, int]) -> str:
    for unit, factor in units.items():
        if value >= factor:
            return f"{value} {unit}" if factor == 1 else f"{value / factor:.2f} {unit}"
    return str(value)
