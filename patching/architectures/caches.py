"""What each layer of a model caches while it generates, found by running the empty model.

Config fields do not say it: attention may share heads, compress keys and values, or keep a state of
fixed size. So the empty model reads a few tokens, and what its cache then holds is measured.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from patching.architectures.experts import expert_modules

CACHE_FIELDS = ("past_key_values", "cache_params")
"""Names of the cache in the output of a model without its head."""
FEW_TOKENS = 2, 3
"""Two lengths of text, shorter than any sliding window, that tell growth from a fixed size."""


class LayerCache(NamedTuple):
    """What one layer caches for one sequence, in bytes."""

    per_token: int
    window: int | None
    """Most tokens that are kept, None for all."""
    fixed: int
    """Bytes that do not depend on the length, such as the state of a linear attention."""

    def num_bytes(self, num_tokens: int) -> int:
        kept = num_tokens if self.window is None else min(num_tokens, self.window)
        return self.per_token * kept + self.fixed


def layer_caches(
    model: PreTrainedModel, layers: nn.ModuleList, first_alike: Sequence[int]
) -> list[LayerCache] | None:
    """Return what each layer caches, in the dtype of the empty `model`. None if it is not known,
    because the model's code does not run without data or keeps its cache in another form.

    `first_alike[i]` is the first layer that caches as much as layer i. Only those are run.
    """
    try:
        fewer, more = (_cached(model, layers, first_alike, length) for length in FEW_TOKENS)
    except Exception:  # the code of a model may raise anything
        return None
    if fewer is None or more is None:
        return None
    found: dict[int, LayerCache] = {}
    for i in set(first_alike):
        growth = more[i][0] - fewer[i][0]
        fixed = fewer[i][0] - FEW_TOKENS[0] * growth
        if not fewer[i][0]:
            return None  # this layer keeps what it caches elsewhere
        found[i] = LayerCache(growth, more[i][1], fixed)
    return [found[i] for i in first_alike]


@torch.no_grad()
def _cached(
    model: PreTrainedModel, layers: nn.ModuleList, first_alike: Sequence[int], length: int
) -> dict[int, tuple[int, int | None]] | None:
    """Return the bytes that each layer caches for a text of `length` tokens, and its window."""
    outputs: dict[int, Any] = {}
    with ExitStack() as undo, torch.device("meta"):
        for _, module in expert_modules(model):  # which experts are chosen needs data
            _replace_forward(undo, module, lambda hidden, *_, **__: hidden)
        for module in model.modules():
            if "rope_type" in vars(module):  # some frequencies are updated for the text's length
                _replace_forward(undo, module, partial(unwrap(type(module).forward), module))
        for i, first in enumerate(first_alike):
            if i == first:
                hook = layers[i].register_forward_hook(
                    lambda _layer, _args, output, i=i: outputs.__setitem__(i, output)
                )
                undo.callback(hook.remove)
            else:
                _replace_forward(undo, layers[i], lambda *_, first=first, **__: outputs[first])
        # Not token ids, because some models look for padding in them.
        embedded_1TD = model.get_input_embeddings()(torch.zeros(1, length, dtype=torch.long))
        output = model.base_model(inputs_embeds=embedded_1TD, use_cache=True)
    caches = [output[name] for name in CACHE_FIELDS if isinstance(output.get(name), Cache)]
    if not caches:
        return None
    return {
        i: (_num_bytes(caches[0].layers[i]), getattr(caches[0].layers[i], "sliding_window", None))
        for i in set(first_alike)
    }


def _replace_forward(undo: ExitStack, module: nn.Module, forward: Any) -> None:
    module.forward = forward
    undo.callback(delattr, module, "forward")


def _num_bytes(layer: CacheLayerMixin | LinearAttentionCacheLayerMixin) -> int:
    tensors = [leaf for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim > 1)  # others are counters
