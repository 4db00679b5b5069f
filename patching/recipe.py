"""A recipe: which layer of which model goes where. Students, pruned baselines and patched models
are all recipes.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from patching.blocks import LayerMap, Order

Parent = Literal["student", "teacher"]


class Reference(NamedTuple):
    """A model as its user names it: a folder or a hub repository, and its revision there."""

    name_or_path: str
    revision: str | None = None


class LayerSource(NamedTuple):
    """One layer of one of the two parents, 0-based."""

    parent: Parent
    layer_idx: int


@dataclass(frozen=True)
class Recipe:
    """An ordered list of layer sources; embedding goes with the first layer's parent, norm and head
    with the last's.
    """

    layers: tuple[LayerSource, ...]
    embedding: Parent
    """Parent of the embedding and of all that is per model, such as rotary tables."""
    head: Parent
    """Parent of the final norm and the head."""

    @classmethod
    def of(cls, layers: list[LayerSource]) -> "Recipe":
        return cls(tuple(layers), embedding=layers[0].parent, head=layers[-1].parent)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def parents(self) -> set[Parent]:
        """The models that supply anything at all."""
        return {self.embedding, self.head, *(source.parent for source in self.layers)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a provenance file: layers as `student 3`, `teacher 17`."""
        return {
            "embedding": self.embedding,
            "layers": [f"{source.parent} {source.layer_idx}" for source in self.layers],
            "norm_and_head": self.head,
        }


def whole_model(num_layers: int) -> Recipe:
    """A model of so many layers itself, as the teacher."""
    return Recipe.of([LayerSource("teacher", layer) for layer in range(num_layers)])


def initial_student(layer_map: LayerMap) -> Recipe:
    """The kept teacher layers: what distillation starts from."""
    return Recipe.of([LayerSource("teacher", layer) for layer in layer_map.kept])


def patched_model(layer_map: LayerMap, patched_layers: frozenset[int]) -> Recipe:
    """The student with each layer of `patched_layers` replaced by its whole teacher block."""
    layers = []
    for i, block in enumerate(layer_map.blocks):
        if i in patched_layers:
            layers += [LayerSource("teacher", layer) for layer in block]
        else:
            layers.append(LayerSource("student", i))
    return Recipe.of(layers)


def intermediate_model(layer_map: LayerMap, num_layers_to_patch: int, order: Order) -> Recipe:
    """The family's member of size k: the student at k = 0, the teacher at k = max."""
    return patched_model(layer_map, layer_map.patched_layers(num_layers_to_patch, order))


def naively_pruned(layer_map: LayerMap, recipe: Recipe) -> Recipe:
    """The same depth without distillation: each student layer becomes the teacher layer it was
    initialised from.
    """
    layers = tuple(
        LayerSource("teacher", layer_map.kept[source.layer_idx])
        if source.parent == "student"
        else source
        for source in recipe.layers
    )
    return replace(recipe, layers=layers, embedding="teacher", head="teacher")
