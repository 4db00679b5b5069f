"""Which layers of a model matter: block influence (ShortGPT, arXiv 2403.03853).

    influence of layer l = 1 - mean over tokens of cos(what layer l reads, what it writes)

A layer that hardly turns its input has little influence. Shapes: B rows, T positions, D hidden
size.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from patching.families import family_of
from patching.recipe import LayerSource, Recipe


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[float]:
    """Each layer's influence on some text, in one pass over it.

    A batch has `input_ids` and `attention_mask`, both (B, T); padding does not count. What the last
    layer writes is taken before the final norm. Raises ValueError where there is no token.
    """
    layers = model.get_submodule(family_of(model.config).layers)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    num_tokens = 0
    mask_BT = torch.empty(0)

    def when_run(index: int):
        def hook(_layer, args, kwargs, output) -> None:
            read_BTD = args[0] if args else kwargs["hidden_states"]
            written_BTD = output[0] if isinstance(output, tuple) else output
            similarity_BT = cosine_similarity(read_BTD.float(), written_BTD.float(), dim=-1)
            totals[index] += similarity_BT[mask_BT].double().sum().cpu()

        return layers[index].register_forward_hook(hook, with_kwargs=True)

    handles = [when_run(index) for index in range(len(layers))]
    try:
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask_BT = batch["attention_mask"].bool()
            num_tokens += int(mask_BT.sum())
            model.base_model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if num_tokens == 0:
        raise ValueError("there is no text to measure block influence on")
    return (1 - totals / num_tokens).tolist()


def most_influential(influences: Sequence[float], depth: int) -> Recipe:
    """The teacher without the layers of least influence, `depth` of them left, in their order."""
    by_influence = sorted(range(len(influences)), key=lambda layer: (-influences[layer], layer))
    return Recipe.of([LayerSource("teacher", layer) for layer in sorted(by_influence[:depth])])
