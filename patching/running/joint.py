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
from patching.running.layer_calls import (
    Picked,
    after_layers,
    by_other,
    embedding_of,
    layers_of,
    on_rows,
    reading,
)


@dataclass
class JointModel:
    """A model with the layers of several members."""

    model: PreTrainedModel
    places: dict[str, list[int]]
    """The positions of each member's layers in the model, by the member's name."""
    ends: list["Ends"]
    """What members have instead of the model's embedding or head."""

    @cached_property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.model)

    @cached_property
    def after_layers(self) -> list[nn.Module]:
        return after_layers(self.model)

    @classmethod
    def alone(cls, name: str, model: PreTrainedModel) -> "JointModel":
        """One member, which may be of an architecture that patching does not support."""
        return cls(model, {name: [*range(model.config.get_text_config().num_hidden_layers)]}, [])

    def members_with(self, place: int) -> list[int]:
        """The members that have this layer, by their position."""
        return [i for i, places in enumerate(self.places.values()) if place in places]

    def cache(self, caches: Mapping[str, Cache], num_new_tokens: int) -> Cache:
        """The members' caches of the same prompts as one, with room for so many tokens. Each of its
        layers has the rows of the members that have that layer.
        """
        joint = DynamicCache(config=self.model.config)
        members = [*self.places]
        for place in range(len(joint.layers)):
            layers = [
                caches[name].layers[self.places[name].index(place)]
                for name in (members[i] for i in self.members_with(place))
            ]
            joint.layers[place] = joined(layers, num_new_tokens)
        return joint


@dataclass
class Ends:
    """The embedding or the head of a member that differ from those of the joint model."""

    member: int
    model: PreTrainedModel
    first_layer: nn.Module | None
    """The member's, None if the embedding is the joint model's."""
    after_layers: Sequence[nn.Module]
    """The member's norm and head, none if they are the joint model's."""


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
        self._picked_for_ends = [
            (ends, self._rows_of(torch.tensor(ends.member, device=self.members_R.device)))
            for ends in self.joint.ends
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
            undo.enter_context(reading(layers[0], self._embedded(inputs)))
            for ends, picked in self._picked_for_ends:
                if len(picked):
                    for module, other in zip(self.joint.after_layers, ends.after_layers):
                        undo.enter_context(by_other(module, other, picked))
            logits_RV = self.joint.model(**inputs).logits[:, -1]
        for layer, picked in zip(self.cache.layers, self._picked):
            if not len(picked):  # any layer may be asked how long the rows are
                layer.cumulative_length += 1
        return logits_RV

    def _embedded(self, inputs: Mapping[str, Any]) -> list[tuple[Picked, Tensor]]:
        """Rows with another embedding than the joint model's, and what their first layer reads."""
        return [
            (picked, embedding_of(ends.model, ends.first_layer, picked.of(inputs)))
            for ends, picked in self._picked_for_ends
            if ends.first_layer is not None and len(picked)
        ]


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
    ends_of = {
        name: (recipe.embedding, recipe.embedding_scale, recipe.head)
        for name, recipe in recipes.items()
    }
    (embedding, scale, head), _ = Counter(ends_of.values()).most_common(1)[0]
    try:
        joint = assemble(Recipe(layers, embedding, head, scale))
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
            [
                Ends(
                    i,
                    model := models[name],
                    layers_of(model)[0] if ends[:2] != (embedding, scale) else None,
                    after_layers(model) if ends[2] != head else [],
                )
                for i, (name, ends) in enumerate(ends_of.items())
                if ends != (embedding, scale, head)
            ],
        )
    ]


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
