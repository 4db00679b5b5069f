"""Layer collapse: later layers merged into an earlier one, without training (LaCo, 2402.11187).

    theta*_l = theta_l + sum over k = 1..m of (theta_{l+k} - theta_l)

merges the m layers that follow layer l into it. Merges are tried from the top of the model down. A
merge stays if the model's last hidden states are still similar to the teacher's on a few texts.

The authors' notebook adds each difference to the layer as changed so far, which leaves the matrices
of layer l + m. This module computes the paper's formula, over all tensors of a layer.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of
from patching.assemble import assemble
from patching.recipe import LayerSource, Recipe
from patching.running.placement import over_devices
from patching.running.similarity import last_states

INTERVAL = 2
"""Layers from one merge down to the next, as in the paper."""
MOST_COMBINED = 6
"""Layers that one merge makes one of, at most. The paper chooses this number for each teacher."""


class CollapsedLayer(NamedTuple):
    """A weighted sum of teacher layers, in the place of one of them."""

    place: int
    """The teacher layer that it replaces, whose kind of attention it keeps."""
    weights: tuple[tuple[int, int], ...]
    """Teacher layers and their weights, which add up to 1."""

    def __str__(self) -> str:
        terms = [
            f"{'-' if weight < 0 else '+'} {f'{abs(weight)} x ' if abs(weight) > 1 else ''}"
            f"teacher {layer}"
            for layer, weight in self.weights
        ]
        return " ".join(terms).removeprefix("+ ")


@dataclass(frozen=True)
class CollapsedTeacher:
    """A teacher some of whose layers are merged."""

    layers: tuple[CollapsedLayer, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def places(self) -> Recipe:
        """The recipe of the teacher layers that its layers replace."""
        return Recipe.of([LayerSource("teacher", layer.place) for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data, like a recipe's, with layers such as `teacher 4 + teacher 5 -
        teacher 3`.
        """
        return self.places.to_dict() | {"layers": [str(layer) for layer in self.layers]}


Similarity = Callable[[CollapsedTeacher], float]
"""How similar a model is to its teacher, at most 1, and -inf where layers cannot be merged."""


class Collapse(NamedTuple):
    """A collapsed teacher, and how it was found."""

    teacher: CollapsedTeacher
    similarity: float
    threshold: float
    """The highest threshold of similarity at which the merges reach this depth."""
    num_combined: int
    """Layers that a merge makes one of."""


def unmerged(num_layers: int) -> CollapsedTeacher:
    return CollapsedTeacher(tuple(CollapsedLayer(t, ((t, 1),)) for t in range(num_layers)))


def merge(layers: Sequence[CollapsedLayer]) -> CollapsedLayer:
    """Merge consecutive layers into the first of them, by the formula above."""
    first, *others = layers
    weights = Counter({layer: (1 - len(others)) * weight for layer, weight in first.weights})
    for other in others:
        weights.update(dict(other.weights))
    return CollapsedLayer(first.place, tuple(sorted((t, w) for t, w in weights.items() if w)))


def collapse_once(
    num_layers: int, depth: int, num_combined: int, threshold: float, similarity: Similarity
) -> tuple[CollapsedTeacher, float]:
    """Go down the teacher once (algorithm 1 of the paper), until `depth` layers are left. Return
    the result, which is deeper if too few merges were above the threshold, and the greatest
    similarity of a merge that was not.

    The merge that would go beyond `depth` takes only as many layers as are to go.
    """
    collapsed, greatest_below = unmerged(num_layers), -math.inf
    first = num_layers - num_combined
    while first >= 0 and (num_to_go := collapsed.depth - depth) > 0:
        layers = collapsed.layers
        end = first + min(num_combined, num_to_go + 1)
        merged = CollapsedTeacher((*layers[:first], merge(layers[first:end]), *layers[end:]))
        found = similarity(merged)
        if found > threshold:
            collapsed = merged
            first = min(first - INTERVAL, merged.depth - num_combined)
        else:
            greatest_below = max(greatest_below, found)
            first -= 1
    return collapsed, greatest_below


def collapse(num_layers: int, depth: int, similarity: Similarity) -> Collapse:
    """Collapse a teacher to exactly `depth` layers.

    For each number of combined layers, the threshold is lowered until the merges reach that depth.
    Of these models, the most similar one is returned. Raises ValueError if none is that small.
    """
    num_to_go = num_layers - depth
    found = []
    for num_combined in {*range(2, min(MOST_COMBINED, num_to_go + 1) + 1), num_to_go + 1}:
        threshold, collapsed = 1.0, unmerged(num_layers)
        while collapsed.depth > depth and threshold > -math.inf:
            collapsed, greatest_below = collapse_once(
                num_layers, depth, num_combined, threshold, similarity
            )
            if collapsed.depth > depth:
                # Nothing changes until the threshold is below that.
                threshold = math.nextafter(greatest_below, -math.inf)
        if collapsed.depth == depth:
            found.append(Collapse(collapsed, similarity(collapsed), threshold, num_combined))
    if not found:
        raise ValueError(f"the teacher's {num_layers} layers cannot be merged into {depth}")
    return max(found, key=lambda collapse: collapse.similarity)


@torch.no_grad()
def similarity_on(teacher: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Similarity:
    """Return the similarity of a collapsed teacher's last hidden states to the teacher's: the
    cosine between all states of a text, averaged over texts, as the authors compute it.

    A batch holds `input_ids` and `attention_mask`, both of shape (B, T).
    """
    batches = list(batches)
    masks = [batch["attention_mask"].to(teacher.device) for batch in batches]
    shapes = [
        {name: tensor.shape for name, tensor in layer.state_dict().items()}
        for layer in _layers_of(teacher)
    ]

    def states_of(model: PreTrainedModel) -> list[Tensor]:
        states = last_states(model, batches)
        return [
            (state_BTD.float() * mask_BT[..., None]).flatten(1)
            for state_BTD, mask_BT in zip(states, masks)
        ]

    teacher_states = states_of(teacher)

    @cache
    def similarity(collapsed: CollapsedTeacher) -> float:
        for layer in collapsed.layers:
            if any(shapes[other] != shapes[layer.place] for other, _ in layer.weights):
                return -math.inf
        states = states_of(collapsed_model(collapsed, teacher))
        cosines = [cosine_similarity(*both, dim=1) for both in zip(states, teacher_states)]
        mean = torch.cat(cosines).double().mean().item()
        return mean if math.isfinite(mean) else -math.inf  # merged weights may overflow

    return similarity


@torch.no_grad()
def collapsed_model(collapsed: CollapsedTeacher, teacher: PreTrainedModel) -> PreTrainedModel:
    """Return the model in eval mode. It shares with the teacher, which does not change, all tensors
    but those of merged layers. These are added in fp32 and stored in the teacher's dtype.
    """
    model = assemble(collapsed.places, teacher=teacher)
    sources = [layer.state_dict() for layer in _layers_of(teacher)]
    for module, layer in zip(_layers_of(model), collapsed.layers):
        if layer.weights == ((layer.place, 1),):
            continue
        tensors = module.state_dict()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                terms = (weight * sources[t][name].float() for t, weight in layer.weights)
                tensors[name] = sum(term.to(tensor.device) for term in terms).to(tensor.dtype)
        module.load_state_dict(tensors, assign=True)
    return over_devices(model)


def _layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.get_submodule(architecture_of(model.config).layers)
