"""Elementwise passes of the loss, fused into few kernels where --torch_compile asks for it."""

from collections.abc import Callable
from functools import cache

import torch


def fused(function: Callable, backend: str | None) -> Callable:
    """Return a function that computes the same in fewer passes over memory, or the function itself
    if `backend`, that of torch.compile, is None.
    """
    return function if backend is None else _compiled(function, backend)


@cache
def _compiled(function: Callable, backend: str) -> Callable:
    return torch.compile(function, backend=backend)
