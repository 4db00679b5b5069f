"""The size of each member of a family, from configs alone, and which member fits a limit.

Stored sizes do not always grow with depth: if embedding and head come from different models, a tied
matrix is stored twice. So a limit is compared with every member.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from patching.architectures.caches import LayerCache
from patching.architectures.lookup import max_positions
from patching.assemble import ParameterCount
from patching.checkpoints.file_sizes import bytes_of_files
from patching.checkpoints.layout import Layout, bytes_of
from patching.recipe import Parent, Recipe


@dataclass(frozen=True)
class Size:
    """What it takes to store and run a model."""

    depth: int
    parameters: ParameterCount
    active_parameters: int | None
    """Stored parameters that a token uses: all but experts that are not chosen. None if that is not
    known.
    """
    bytes_on_disk: int
    """All weights files in the chosen dtype, with their headers."""
    weights_bytes: int
    """The stored parameters in the chosen dtype."""
    caches: tuple[tuple[LayerCache, int], ...] | None
    """What layers cache, each with the number of such layers. None if it is not known."""
    flops_per_token: int | None
    """Forward pass: two for each active parameter that is multiplied, without the products of
    queries and keys, which grow with the text. None if the active ones are not known.
    """

    @property
    def kv_cache_bytes_per_token(self) -> int | None:
        """For all layers, while the text is shorter than every window. None if it is not known."""
        if self.caches is None:
            return None
        return sum(cache.per_token * num_layers for cache, num_layers in self.caches)

    def memory_bytes(self, context: int, batch: int = 1) -> int | None:
        """Weights, and the cache of `batch` sequences of `context` tokens, without activations and
        what the engine itself takes. None if the cache is not known.
        """
        if self.caches is None:
            return None
        cached = sum(cache.num_bytes(context) * num_layers for cache, num_layers in self.caches)
        return self.weights_bytes + batch * cached

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self) | {
            "parameters": self.parameters._asdict(),
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
        }
        if self.caches is not None:
            values["caches"] = [
                cache._asdict() | {"num_layers": num_layers} for cache, num_layers in self.caches
            ]
        return values


def size_of(recipe: Recipe, layouts: Mapping[Parent, Layout], max_shard_bytes: int) -> Size:
    """Return the size of a recipe's model, saved in files of at most `max_shard_bytes`. `layouts`
    are those of its parents in the dtype to save.
    """
    embedding, head = layouts[recipe.embedding], layouts[recipe.head]
    parts = [(embedding, "embedding"), (head, "head")]
    parts += [(layouts[parent], layer_idx) for parent, layer_idx, _ in recipe.layers]
    costs = [layout.costs[part] for layout, part in parts]
    both = sum(cost.parameters for cost in costs)
    again = 0
    if recipe.may_tie and embedding.is_tied:
        tied = {head.memory_name(name)[0] for name in head.tied_names}
        again = sum(head.memory[name].numel() for name in tied)
    stored = bytes_of(recipe, layouts)
    knows_experts = all(layouts[parent].expert_shares is not None for parent in recipe.parents)
    return Size(
        depth=recipe.depth,
        parameters=ParameterCount(both - again, both),
        active_parameters=sum(cost.active for cost in costs) - again if knows_experts else None,
        bytes_on_disk=bytes_of_files(stored, max_shard_bytes),
        weights_bytes=int(stored.data.sum()),
        caches=_caches(recipe, layouts),
        flops_per_token=sum(cost.flops for cost in costs) if knows_experts else None,
    )


def _caches(
    recipe: Recipe, layouts: Mapping[Parent, Layout]
) -> tuple[tuple[LayerCache, int], ...] | None:
    if any(layouts[parent].caches is None for parent in recipe.parents):
        return None
    caches = Counter(layouts[parent].caches[layer_idx] for parent, layer_idx, _ in recipe.layers)
    return tuple(caches.items())


LIMITS: dict[str, tuple[str, Callable[[Size, int, int], int | None]]] = {
    "target_params": ("parameters", lambda size, *_: size.parameters.stored),
    "target_active_params": ("parameters", lambda size, *_: size.active_parameters),
    "target_bytes": ("bytes", lambda size, *_: size.bytes_on_disk),
    "target_memory": ("bytes", lambda size, *cached: size.memory_bytes(*cached)),
}
"""Limits that name a size: their unit, and what they limit, given a size, context and batch."""


def deepest_within(
    sizes: Sequence[Size], name: str, limit: int, context: int = 0, batch: int = 1
) -> int:
    """Return the index of the deepest member within one of the LIMITS.

    Raises ValueError if no member is, or if it is not known which are.
    """
    unit, cost_of = LIMITS[name]
    costs = [cost_of(size, context, batch) for size in sizes]
    if None in costs:
        raise ValueError(
            f"{name}={limit:,}: it is not known how many {unit} that are for this architecture, "
            "use target_params or target_bytes"
        )
    return deepest_that_fits(costs, limit, name, unit)


def check_cached_text(config: PreTrainedConfig, context: int | None, batch: int) -> None:
    """Raise ValueError unless a model of this config can keep so many texts of so many tokens in
    its cache.
    """
    if context is None:
        raise ValueError("target_memory needs context: how many tokens the cache holds")
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}: choose 1 or more")
    longest = max_positions(config)
    if longest is not None and context > longest:
        raise ValueError(
            f"context={context}: this {config.model_type} model has positions for {longest} "
            f"tokens, choose 1-{longest}"
        )


def deepest_that_fits(costs: Sequence[int], limit: int, name: str, unit: str) -> int:
    """Return the index of the deepest member that costs at most `limit`. Members are in order of
    depth.

    Raises ValueError, with the name of the limit and the smallest cost, if no member fits.
    """
    fitting = [k for k, cost in enumerate(costs) if cost <= limit]
    if not fitting:
        raise ValueError(
            f"{name}={limit:,}: no member of this family fits, the smallest takes "
            f"{min(costs):,} {unit}"
        )
    return fitting[-1]
