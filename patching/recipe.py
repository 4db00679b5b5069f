"""A recipe says which layer of which model goes where. Initial students, pruned baselines and
patched models are all recipes.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from patching.blocks import LayerMap, Order

Parent = Literal["student", "teacher"]


class Reference(NamedTuple):
    """A model as a user names it: a folder or a hub repository, and its revision on the hub."""

    name_or_path: str
    revision: str | None = None


class LayerSource(NamedTuple):
    """One layer of one parent, with a 0-based index."""

    parent: Parent
    layer_idx: int


@dataclass(frozen=True)
class Recipe:
    """The source of each layer of a model, and of its embedding and head."""

    layers: tuple[LayerSource, ...]
    embedding: Parent
    """Parent of the embedding and of other modules outside the layers, such as rotary tables."""
    head: Parent
    """Parent of the final norm and the head."""

    @classmethod
    def of(cls, layers: list[LayerSource]) -> "Recipe":
        """Return the recipe of these layers, with the embedding from the first layer's parent and
        the final norm and head from the last layer's.
        """
        return cls(tuple(layers), embedding=layers[0].parent, head=layers[-1].parent)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def parents(self) -> set[Parent]:
        """The models that supply any part."""
        return {self.embedding, self.head, *(source.parent for source in self.layers)}

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON data, with layers such as `student 3` and `teacher 17`."""
        return {
            "embedding": self.embedding,
            "layers": [f"{source.parent} {source.layer_idx}" for source in self.layers],
            "norm_and_head": self.head,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """Return the recipe that `to_dict` wrote, such as `recipe` in a model's provenance.json.

        Raises ValueError, naming the entry, for anything else.
        """
        keys = ("embedding", "layers", "norm_and_head")
        if not isinstance(values, dict) or values.keys() != set(keys):
            found = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
            raise ValueError(f"recipe: it needs exactly the keys {', '.join(keys)}, not {found}")
        embedding, layers, head = (values[key] for key in keys)
        for key, parent in (("embedding", embedding), ("norm_and_head", head)):
            if parent not in get_args(Parent):
                raise ValueError(f"recipe: {key} is {parent!r}, choose student or teacher")
        if not isinstance(layers, list) or not layers:
            raise ValueError(f"recipe: layers is {layers!r}, write a list such as ['student 3']")
        return cls(tuple(map(_read_source, layers)), embedding, head)


def _read_source(text: Any) -> LayerSource:
    found = re.fullmatch(r"(student|teacher) ([0-9]+)", text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"recipe: {text!r} is not a layer, write its parent and index such as 'student 3'"
        )
    return LayerSource(found[1], int(found[2]))


def whole_model(num_layers: int) -> Recipe:
    """Return the recipe for an unmodified teacher with `num_layers` layers."""
    return Recipe.of([LayerSource("teacher", layer) for layer in range(num_layers)])


def initial_student(layer_map: LayerMap) -> Recipe:
    """Return the recipe of the student before distillation: the kept teacher layers."""
    return Recipe.of([LayerSource("teacher", layer) for layer in layer_map.kept])


def patched_model(layer_map: LayerMap, patched_layers: frozenset[int]) -> Recipe:
    """Return the student with each layer in `patched_layers` replaced by its teacher block."""
    layers = []
    for i, block in enumerate(layer_map.blocks):
        if i in patched_layers:
            layers += [LayerSource("teacher", layer) for layer in block]
        else:
            layers.append(LayerSource("student", i))
    return Recipe.of(layers)


def intermediate_model(layer_map: LayerMap, num_layers_to_patch: int, order: Order) -> Recipe:
    """Return the member of size k along an order: the student at k = 0, the teacher at k = max."""
    return patched_model(layer_map, layer_map.patched_layers(num_layers_to_patch, order))


def naively_pruned(layer_map: LayerMap, recipe: Recipe) -> Recipe:
    """Return a recipe of the same depth without distillation.

    Each student layer becomes the teacher layer it was initialized from, and all other parts come
    from the teacher.
    """
    layers = tuple(
        LayerSource("teacher", layer_map.kept[source.layer_idx])
        if source.parent == "student"
        else source
        for source in recipe.layers
    )
    return replace(recipe, layers=layers, embedding="teacher", head="teacher")
