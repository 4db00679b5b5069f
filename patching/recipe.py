"""A recipe says which layer of which model goes where. Initial students, pruned baselines and
patched models are all recipes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
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
    scale: float = 1.0
    """What the layer writes to the residual stream is multiplied by it, see `with_scales`."""


@dataclass(frozen=True)
class Recipe:
    """The source of each layer of a model, and of its embedding and head."""

    layers: tuple[LayerSource, ...]
    embedding: Parent
    """Parent of the embedding and of other modules outside the layers, such as rotary tables."""
    head: Parent
    """Parent of the final norm and the head."""
    embedding_scale: float = 1.0
    """What the embeddings of tokens and positions are multiplied by."""

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

    @property
    def may_tie(self) -> bool:
        """Whether a tied parent's head is still equal to its embedding in this model."""
        return self.embedding == self.head and self.embedding_scale == 1

    @property
    def student_runs(self) -> list[tuple[int, ...]]:
        """Runs of student layers, each a stretch of the model without teacher layers."""
        by_parent = groupby(self.layers, key=lambda source: source.parent)
        return [
            tuple(source.layer_idx for source in run)
            for parent, run in by_parent
            if parent == "student"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON data, with layers such as `student 3`, `student 3 x 1.21` and
        `teacher 17`.
        """
        return {
            "embedding": f"{self.embedding}{_times(self.embedding_scale)}",
            "layers": [
                f"{source.parent} {source.layer_idx}{_times(source.scale)}"
                for source in self.layers
            ],
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
        embedding, scale = _without_scale(embedding)
        for key, parent in (("embedding", embedding), ("norm_and_head", head)):
            if parent not in get_args(Parent):
                raise ValueError(f"recipe: {key} is {parent!r}, choose student or teacher")
        _check_scale(embedding, scale)
        if not isinstance(layers, list) or not layers:
            raise ValueError(f"recipe: layers is {layers!r}, write a list such as ['student 3']")
        return cls(tuple(map(_read_source, layers)), embedding, head, scale)


def _times(scale: float) -> str:
    return "" if scale == 1 else f" x {scale!r}"


def _without_scale(text: Any) -> tuple[Any, float]:
    """Split what `_times` appended from a text."""
    found = re.fullmatch(r"(.*) x ([0-9.]+(?:e[+-]?[0-9]+)?)", text) if type(text) is str else None
    if found is None:
        return text, 1.0
    try:
        return found[1], float(found[2])
    except ValueError:
        return text, 1.0


def _check_scale(parent: Parent, scale: float) -> None:
    """Raise ValueError for a factor that no recipe may have."""
    if not (0 < scale < math.inf):
        raise ValueError(f"recipe: a factor is {scale}, choose a number above 0")
    if parent == "teacher" and scale != 1:
        raise ValueError("recipe: parts of the teacher are never scaled")


def _read_source(text: Any) -> LayerSource:
    name, scale = _without_scale(text)
    found = re.fullmatch(r"(student|teacher) ([0-9]+)", name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"recipe: {text!r} is not a layer, write its parent and index such as 'student 3'"
        )
    _check_scale(found[1], scale)
    return LayerSource(found[1], int(found[2]), scale)


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


def with_scales(recipe: Recipe, factors: Mapping[int, float]) -> Recipe:
    """Return a recipe in which runs of student layers are rescaled.

    `factors` hold a number for runs, by the first student layer of each. Everything that the layers
    of a run write to the residual stream is multiplied by it, and so are the embeddings if the run
    begins the model. Where each layer reads the stream through a norm, the layers of a run that
    begins the model compute what they did, and the layer that follows reads a stream that is longer
    by the factor. A run that ends the model needs no more: the final norm takes the factor out.

    Raises ValueError for a layer that does not begin a run, or a factor that is not above 0.
    """
    runs = {run[0]: run for run in recipe.student_runs}
    if unknown := sorted(factors.keys() - runs):
        starts = ", ".join(map(str, runs)) or "none"
        raise ValueError(
            f"no run of student layers begins with layer {unknown[0]} in this model: they begin "
            f"with {starts}"
        )
    for scale in factors.values():
        _check_scale("student", scale)
    scale_of = {i: float(factors.get(start, 1.0)) for start, run in runs.items() for i in run}
    layers = tuple(
        source._replace(scale=scale_of[source.layer_idx]) if source.parent == "student" else source
        for source in recipe.layers
    )
    begins = recipe.embedding == "student" and layers[0].parent == "student"
    return replace(recipe, layers=layers, embedding_scale=layers[0].scale if begins else 1.0)


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
    return Recipe(layers, embedding="teacher", head="teacher")
