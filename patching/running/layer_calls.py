"""What the layers of a model are made to do during a forward pass of generation, and the parts of a
pass before and after them.

Shapes: R rows of one token, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(architecture_of(model.config).layers)


def select_rows(value: Any, picked: Tensor, num_rows: int) -> Any:
    """Some of the rows of whatever has that many rows."""
    if isinstance(value, Tensor) and value.dim() and len(value) == num_rows:
        return value[picked.to(value.device)]
    if isinstance(value, Mapping):
        return {name: select_rows(of_name, picked, num_rows) for name, of_name in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(select_rows(part, picked, num_rows) for part in value)
    return value


@contextmanager
def calling(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Make a layer call this during the block. It is given what the layer did until then, and its
    arguments, of which the first is the state that it reads.
    """
    before = vars(layer).get("forward")  # that of a layer on several devices has hooks
    run = layer.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        hidden, *args = args or (kwargs.pop("hidden_states"),)
        return forward(run, hidden, *args, **kwargs)

    layer.forward = instead
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def on_rows(layer: nn.Module, picked: Tensor, num_rows: int) -> AbstractContextManager[None]:
    """Make a layer run on some of its rows during the block, and leave the others as they are."""

    def forward(run: Callable[..., Any], hidden_R1D: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not len(picked):
            return hidden_R1D
        args, kwargs = select_rows(args, picked, num_rows), select_rows(kwargs, picked, num_rows)
        state = run(select_rows(hidden_R1D, picked, num_rows), *args, **kwargs)
        return hidden_R1D.to(state.device).index_copy(0, picked.to(state.device), state)

    return calling(layer, forward)


def reading(
    layer: nn.Module, others: Sequence[tuple[Tensor, Tensor]]
) -> AbstractContextManager[None]:
    """Make a layer read other states for some rows during the block."""

    def forward(run: Callable[..., Any], hidden_R1D: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for picked, state in others:
            device = hidden_R1D.device
            hidden_R1D = hidden_R1D.index_copy(0, picked.to(device), state.to(device))
        return run(hidden_R1D, *args, **kwargs)

    return calling(layer, forward)


class _Embedded(Exception):
    """Ends a forward pass before the first layer."""


def embedding_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """What the first layer of a model reads."""
    read: list[Tensor] = []

    def forward(_: Callable[..., Any], hidden_R1D: Tensor, *__: Any, **___: Any) -> Any:
        read.append(hidden_R1D)
        raise _Embedded

    with calling(layers_of(model)[0], forward), suppress(_Embedded):
        model(**inputs)
    return read[0]


def head_of(model: PreTrainedModel, ids_R1: Tensor, last_R1D: Tensor) -> Tensor:
    """The logits of shape (R, V) that a model gives for its last layer's states."""
    with ExitStack() as undo:
        for layer in layers_of(model):
            undo.enter_context(calling(layer, lambda *_, **__: last_R1D))
        return model(ids_R1, use_cache=False).logits[:, -1]
