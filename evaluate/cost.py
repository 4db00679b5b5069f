"""What a model costs on this machine: bytes, speed and memory.

Shapes: B rows, T positions.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from evaluate.result import Cost
from patching.files.outputs import device_name
from patching.running.peak_memory import peak_bytes_during

TIMED_SHAPE = (4, 128)
"""Rows and tokens of the forward passes whose speed and memory are measured."""
TIMED_PASSES = 9


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of the distinct parameters. Tied ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def cost_of(model: PreTrainedModel) -> Cost:
    """Tokens per second of a forward pass, the median of `TIMED_PASSES`, and its memory: the
    weights, and the peak of all other tensors.
    """
    num_rows, num_tokens = TIMED_SHAPE
    num_tokens = min(num_tokens, getattr(model.config, "max_position_embeddings", num_tokens))
    device = model.device
    ids_BT = torch.arange(num_rows * num_tokens, device=device).reshape(num_rows, num_tokens)
    ids_BT = ids_BT % model.config.get_text_config().vocab_size

    def run() -> None:
        model(input_ids=ids_BT, use_cache=False)

    peak_bytes = _peak_bytes(run, device)  # warms up too
    seconds = []
    for _ in range(TIMED_PASSES):
        _wait_for(device)
        start = time.perf_counter()
        run()
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return Cost(
        rows=num_rows,
        tokens_per_row=num_tokens,
        tokens_per_second=num_rows * num_tokens / statistics.median(seconds),
        weights_bytes=weights_bytes(model),
        peak_beyond_weights_bytes=peak_bytes,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_name(),
    )


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that `run` holds at once beyond what was held before."""
    if device.type == "cuda":
        return peak_bytes_during(run, device)
    # Resident memory is too coarse for this, and other allocators do not count.
    with LiveTensors() as live:
        run()
    return live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(storage) for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view has the storage of another tensor, which is not new memory.
            if id(storage) not in before and id(storage) not in self._seen:
                self._seen.add(id(storage))
                self.num_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.num_bytes)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.num_bytes -= num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
