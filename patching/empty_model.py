"""A model without weights, built from its config alone: what transformers itself says about an
architecture.

It lies on torch's meta device, so it takes milliseconds and no memory at any size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patching.auto_class import auto_class

POSITION_ATTRIBUTE = "layer_idx"
"""Where a layer's cache entries go: the one thing about a layer that its position may decide."""

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The config's language model on the meta device."""
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def signature(layer: nn.Module) -> dict[str, Any]:
    """All that decides what a layer computes, but for the numbers in its tensors and its position.

    Classes, shapes and plain attributes of the layer and everything inside it, by name.
    """
    return dict(_facts(layer))


def _facts(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        prefix = f"{name}." if name else ""
        yield f"{prefix}class", type(module).__qualname__
        for tensors in (
            module.named_parameters(recurse=False),
            module.named_buffers(recurse=False),
        ):
            for tensor_name, tensor in tensors:
                yield f"{prefix}{tensor_name}.shape", tuple(tensor.shape)
        for attribute, value in vars(module).items():
            if attribute in _MODULE_INTERNALS or attribute == POSITION_ATTRIBUTE:
                continue
            if value is None or isinstance(value, bool | int | float | str | tuple):
                yield f"{prefix}{attribute}", value


def check_same_layer(source: nn.Module, target: nn.Module, what: str) -> None:
    """Raise ValueError, naming the first difference, unless `target` computes what `source` does,
    given its tensors.

    `what` begins the message: which layer went where.
    """
    here, there = signature(source), signature(target)
    for fact in here | there:
        if here.get(fact) != there.get(fact):
            raise ValueError(
                f"{what} would compute something else: {fact} is {here.get(fact)} where it "
                "comes from and "
                f"{there.get(fact)} where it would go, so this architecture cannot be cut and "
                "joined there"
            )
