"""What the layers of a model are made to do during a forward pass of generation, and the parts of a
pass before and after them.

Shapes: R rows of one token, N of them, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(architecture_of(model.config).layers)


def after_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules with weights that a model runs after its layers, in their sequence."""
    architecture = architecture_of(model.config)
    paths = (architecture.norm, *architecture.between_norm_and_head, architecture.head)
    return [model.get_submodule(path) for path in paths if path is not None]


class Picked:
    """Some of the rows of a batch: a slice where they follow each other, which copies nothing."""

    def __init__(self, rows_N: Tensor, num_rows: int) -> None:
        self.num_rows, self.rows_N = num_rows, rows_N
        self.first, self.last = rows_N[[0, -1]].tolist() if len(rows_N) else (0, -1)

    def __len__(self) -> int:
        return len(self.rows_N)

    def index(self, device: torch.device) -> slice | Tensor:
        if self.last - self.first + 1 == len(self):
            return slice(self.first, self.last + 1)
        return self.rows_N.to(device)

    def of(self, value: Any) -> Any:
        """These rows of whatever has as many rows as the batch."""
        if isinstance(value, Tensor):
            has_rows = value.dim() and len(value) == self.num_rows
            return value[self.index(value.device)] if has_rows else value
        if isinstance(value, Mapping):
            return {name: self.of(of_name) for name, of_name in value.items()}
        return type(value)(map(self.of, value)) if isinstance(value, tuple | list) else value

    def replaced(self, whole_R: Tensor, part_N: Tensor) -> Tensor:
        """A batch with others in place of these rows."""
        whole_R = whole_R.to(part_N.device, copy=True)
        whole_R[self.index(part_N.device)] = part_N
        return whole_R


@contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make a module call this during the block. It is given what the module did until then, and
    its arguments, of which the first is the state that it reads.
    """
    before = vars(module).get("forward")  # that of a layer on several devices has hooks
    run = module.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        hidden, *args = args or (kwargs.pop("hidden_states"),)
        return forward(run, hidden, *args, **kwargs)

    module.forward = instead
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def on_rows(layer: nn.Module, picked: Picked) -> AbstractContextManager[None]:
    """Make a layer run on some of its rows during the block, and leave the others as they are."""

    def forward(run: Callable[..., Any], hidden_R1D: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not len(picked):
            return hidden_R1D
        return picked.replaced(
            hidden_R1D, run(picked.of(hidden_R1D), *picked.of(args), **picked.of(kwargs))
        )

    return calling(layer, forward)


def by_other(module: nn.Module, other: nn.Module, picked: Picked) -> AbstractContextManager[None]:
    """Make another module run in place of this one on some of its rows during the block."""

    def forward(run: Callable[..., Any], hidden_R1D: Tensor) -> Tensor:
        return picked.replaced(run(hidden_R1D), other(picked.of(hidden_R1D)))

    return calling(module, forward)


def reading(
    layer: nn.Module, others: Sequence[tuple[Picked, Tensor]]
) -> AbstractContextManager[None]:
    """Make a layer read other states for some rows during the block."""

    def forward(run: Callable[..., Any], hidden_R1D: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for picked, state in others:
            hidden_R1D = picked.replaced(hidden_R1D, state)
        return run(hidden_R1D, *args, **kwargs)

    return calling(layer, forward)


class _Embedded(Exception):
    """Ends a forward pass before the first layer."""


def embedding_of(
    model: PreTrainedModel, first_layer: nn.Module, inputs: Mapping[str, Any]
) -> Tensor:
    """What the first layer of a model reads."""
    read: list[Tensor] = []

    def forward(_: Callable[..., Any], hidden_R1D: Tensor, *__: Any, **___: Any) -> Any:
        read.append(hidden_R1D)
        raise _Embedded

    with calling(first_layer, forward), suppress(_Embedded):
        model(**inputs)
    return read[0]
