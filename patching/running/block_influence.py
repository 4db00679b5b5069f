"""Which layers of a model matter: block influence (ShortGPT, arXiv 2403.03853).

    influence of layer l = 1 - mean over tokens of cos(what layer l reads, what it writes)

A layer that hardly turns its input has little influence. Shapes: B rows, T positions.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from patching.recipe import LayerSource, Recipe
from patching.running.similarity import similarity_by_depth


def block_influence(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """Each layer's influence on some text, in one pass over it.

    A batch has `input_ids` and `attention_mask`, both (B, T); padding does not count. What the last
    layer writes is taken before the final norm. Raises ValueError where there is no token.
    """
    return (1 - similarity_by_depth(model, batches).diagonal(1)).tolist()


def most_influential(influences: Sequence[float], depth: int) -> Recipe:
    """The teacher without the layers of least influence, `depth` of them left, in their order."""
    by_influence = sorted(range(len(influences)), key=lambda layer: (-influences[layer], layer))
    return Recipe.of([LayerSource("teacher", layer) for layer in sorted(by_influence[:depth])])
