"""What modules of a model are made to do during a forward pass of generation.

Shapes: R rows of one token, N of them, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(architecture_of(model.config).layers)


class Picked:
    """Some of the rows of a batch: a slice where they follow each other, which copies nothing."""

    def __init__(self, rows_N: Tensor, num_rows: int) -> None:
        self.num_rows, self.rows_N, self.count = num_rows, rows_N, len(rows_N)
        first, last = torch.stack((rows_N[0], rows_N[-1])).tolist() if self.count else (0, -1)
        self.slice = slice(first, last + 1) if last - first + 1 == self.count else None

    def __len__(self) -> int:
        return self.count

    def index(self, device: torch.device) -> slice | Tensor:
        return self.slice or self.rows_N.to(device)

    def of(self, value: Any) -> Any:
        """These rows of whatever has as many rows as the batch."""
        if isinstance(value, Tensor):
            has_rows = value.shape[:1] == (self.num_rows,)
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
    its arguments.
    """
    before = vars(module).get("forward")  # that of a layer on several devices has hooks
    module.forward = partial(forward, module.forward)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def on_rows(layer: nn.Module, picked: Picked) -> AbstractContextManager[None]:
    """Make a layer run on some of its rows during the block, and leave the others as they are."""

    def forward(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        hidden_R1D = args[0] if args else kwargs["hidden_states"]
        if not len(picked):
            return hidden_R1D
        return picked.replaced(hidden_R1D, run(*picked.of(args), **picked.of(kwargs)))

    return calling(layer, forward)


def by_other(module: nn.Module, other: nn.Module, picked: Picked) -> AbstractContextManager[None]:
    """Make another module run in place of this one for some rows during the block."""

    def forward(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        whole = run(*args, **kwargs)
        part = other(*picked.of(args), **picked.of(kwargs))
        return picked.replaced(whole.expand(picked.num_rows, *whole.shape[1:]), part)

    return calling(module, forward)
