"""Members of a family that take each step of generation together: one model with every layer that
any of them has, in which a row runs through the layers of its own member alone.

A step reads one token of each row, so most of its time goes into reading weights and into starting
kernels. Members share most of their layers, and here each layer runs once for the rows of all
members that have it.

Shapes: B rows of one member, R rows of all members, those of one after those of the other, T
positions, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.recipe import LayerSource, Recipe
from patching.running.joint_cache import joined
from patching.running.layer_calls import Picked, by_other, layers_of, on_rows


@dataclass
class JointModel:
    """A model with the layers of several members."""

    model: PreTrainedModel
    places: dict[str, list[int]]
    """The positions of each member's layers in the model, by the member's name."""
    others: dict[int, list[tuple[nn.Module, nn.Module]]]
    """The modules outside the layers that a member, by its position, has with other weights: each
    with the member's.
    """

    @cached_property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.model)

    @classmethod
    def alone(cls, name: str, model: PreTrainedModel) -> "JointModel":
        """One member, which may be of an architecture that patching does not support."""
        return cls(model, {name: [*range(model.config.get_text_config().num_hidden_layers)]}, {})

    def members_with(self, place: int) -> list[int]:
        """The members that have this layer, by their position."""
        return [i for i, places in enumerate(self.places.values()) if place in places]

    def cache(self, caches: Mapping[str, Sequence[Cache]], num_new_tokens: int) -> Cache:
        """The members' caches of the same prompts as one, padded on the left, with room for so many
        tokens. Each member has one for each part of the prompts, the longest ones first. Each layer
        of the one cache has the rows of the members that have that layer.
        """
        joint = DynamicCache(config=self.model.config)
        members = [*self.places]
        for place in range(len(joint.layers)):
            layers = [
                cache.layers[self.places[name].index(place)]
                for name in (members[i] for i in self.members_with(place))
                for cache in caches[name]
            ]
            joint.layers[place] = joined(layers, num_new_tokens)
        return joint


class Rows:
    """The rows of a joint model that are still there: at first B of each member."""

    def __init__(self, joint: JointModel, num_rows: int, cache: Cache) -> None:
        self.joint, self.cache = joint, cache
        device = joint.model.device
        self.members_R = torch.arange(len(joint.places), device=device).repeat_interleave(num_rows)
        self._with_layer = [
            torch.tensor(joint.members_with(place), device=device)
            for place in range(len(cache.layers))
        ]
        self._count()

    def _count(self) -> None:
        self.sizes = torch.bincount(self.members_R, minlength=len(self.joint.places)).tolist()
        """How many rows of each member there are."""
        self._picked = [self._rows_of(members) for members in self._with_layer]
        self._picked_for_others = [
            (modules, self._rows_of(torch.tensor(member, device=self.members_R.device)))
            for member, modules in self.joint.others.items()
        ]

    def _rows_of(self, members: Tensor) -> Picked:
        rows_N = torch.isin(self.members_R, members).nonzero()[:, 0]
        return Picked(rows_N, len(self.members_R))

    def keep(self, is_kept_R: Tensor) -> None:
        """Drop the other rows, also from the cache."""
        for layer, picked in zip(self.cache.layers, self._picked):
            kept_N = picked.of(is_kept_R).nonzero()[:, 0]
            layer.batch_select_indices(kept_N.to(layer.keys.device))
        self.members_R = self.members_R[is_kept_R]
        self._count()

    def step(self, **inputs: Any) -> Tensor:
        """The logits of shape (R, V) after one more token of each row. `inputs` are the arguments
        of the model, with the `input_ids` of shape (R, 1).
        """
        inputs |= {"past_key_values": self.cache, "use_cache": True}
        if len(self.joint.places) == 1:
            return self.joint.model(**inputs).logits[:, -1]
        layers = self.joint.layers
        with ExitStack() as undo:
            for layer, picked in zip(layers, self._picked):
                if len(picked) < len(self.members_R):
                    undo.enter_context(on_rows(layer, picked))
            for modules, picked in self._picked_for_others:
                for own, other in modules if len(picked) else ():
                    undo.enter_context(by_other(own, other, picked))
            logits_RV = self.joint.model(**inputs).logits[:, -1]
        for layer, picked in zip(self.cache.layers, self._picked):
            if not len(picked):  # any layer may be asked how long the rows are
                layer.cumulative_length += 1
        return logits_RV


def joint_models(
    recipes: Mapping[str, Recipe],
    models: Mapping[str, PreTrainedModel],
    assemble: Callable[[Recipe], PreTrainedModel],
) -> list[JointModel]:
    """Join the models of these recipes, if all of them have their layers in the same sequence and
    the same tables of positions, and if the architecture's config can say what these layers are.
    """
    alone = [JointModel.alone(*named) for named in models.items()]
    layers = _merged([recipe.layers for recipe in recipes.values()]) if len(recipes) > 1 else None
    if layers is None:
        return alone
    ends = ((recipe.embedding, recipe.head, recipe.embedding_scale) for recipe in recipes.values())
    try:
        joint = assemble(Recipe(layers, *Counter(ends).most_common(1)[0][0]))
    except ValueError:
        return alone
    tables = _tables_of(joint)
    if not all(_are_equal(tables, _tables_of(model)) for model in models.values()):
        return alone
    return [
        JointModel(
            joint,
            {
                name: [layers.index(source) for source in recipe.layers]
                for name, recipe in recipes.items()
            },
            {i: _others(joint, models[name]) for i, name in enumerate(recipes)},
        )
    ]


def _others(joint: PreTrainedModel, model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """The modules outside the layers of which two models do not share the weights."""
    in_layers = f"{architecture_of(joint.config).layers}."
    others = dict(model.named_modules())
    return [
        (module, others[path])
        for path, module in joint.named_modules()
        if not f"{path}.".startswith(in_layers) and _addresses(module) != _addresses(others[path])
    ]


def _addresses(module: nn.Module) -> list[int]:
    """Where a module's own weights lie."""
    return [parameter.data_ptr() for parameter in module.parameters(recurse=False)]


def _tables_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What layers share: tables of positions."""
    prefix = f"{architecture_of(model.config).layers}."
    return {name: it for name, it in model.named_buffers() if not name.startswith(prefix)}


def _are_equal(tables: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tables.keys() == others.keys() and all(
        torch.equal(table, others[name]) for name, table in tables.items()
    )


def _merged(sequences: Iterable[Sequence[LayerSource]]) -> tuple[LayerSource, ...] | None:
    """One sequence with all layers, in which those of each sequence come in its order. None if
    there is no such sequence.
    """
    sorter: TopologicalSorter[LayerSource] = TopologicalSorter()
    for sequence in sequences:
        sorter.add(sequence[0])
        for before, after in pairwise(sequence):
            sorter.add(after, before)
    try:
        return tuple(sorter.static_order())
    except CycleError:
        return None
