"""Keys and values of several members' rows as one, with room for the tokens to come."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more, so that appending a token does not copy those before."""

    def __init__(self, layers: Sequence[DynamicLayer], num_new_tokens: int) -> None:
        super().__init__()
        self.cumulative_length = layers[0].get_seq_length()
        self.lazy_initialization(layers[0].keys, layers[0].values)
        self._keys, self._values = _stacked(layers, num_new_tokens)
        self._look()

    def _look(self) -> None:
        self.keys, self.values = (
            states[:, :, : self.cumulative_length] for states in (self._keys, self._values)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        start, stop = self.cumulative_length, self.cumulative_length + key_states.shape[-2]
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        self.cumulative_length = stop
        self._look()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._look()


def joined(layers: Sequence[CacheLayerMixin], num_new_tokens: int) -> CacheLayerMixin:
    """The rows of some layers of caches, one after the other, as one layer, padded on the left to
    the length of the first, which is the longest.
    """
    if type(layers[0]) is DynamicLayer:
        return RoomyLayer(layers, num_new_tokens)
    joined = copy(layers[0])
    joined.keys, joined.values = _stacked(layers)
    return joined


def _stacked(layers: Sequence[CacheLayerMixin], num_new_tokens: int = 0) -> Iterator[Tensor]:
    """The keys and then the values of all rows, with room on the right."""
    length = layers[0].keys.shape[-2]
    for parts in zip(*((layer.keys, layer.values) for layer in layers)):
        yield torch.cat(
            [
                nn.functional.pad(part, (0, 0, length - part.shape[-2], num_new_tokens))
                for part in parts
            ]
        )
