"""Block influence: how much each layer of a model changes its input (ShortGPT, arXiv 2403.03853).

influence of layer l = 1 - mean over tokens of cos(input of layer l, output of layer l)
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from patching.recipe import LayerSource, Recipe
from patching.running.similarity import similarity_by_depth


def block_influence(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """Return the block influence of each layer, in one pass over some text.

    A batch holds `input_ids` and `attention_mask`, both of shape (B, T), and padding does not
    count. The output of the last layer is taken before the final norm. Raises ValueError if the
    batches contain no token.
    """
    return (1 - similarity_by_depth(model, batches).diagonal(1)).tolist()


def most_influential(influences: Sequence[float], depth: int) -> Recipe:
    """Return the recipe of the `depth` teacher layers with the most influence, in their order."""
    by_influence = sorted(range(len(influences)), key=lambda layer: (-influences[layer], layer))
    return Recipe.of([LayerSource("teacher", layer) for layer in sorted(by_influence[:depth])])
