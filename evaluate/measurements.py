"""What each size is and costs on this machine: nearness to the teacher, bytes, speed, memory.

Shapes: B rows, T positions, D hidden size.
"""

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from patching.running.hidden_states import hidden_states_at

TIMED_SHAPE = (4, 128)
"""Rows and tokens of the forward passes whose speed and memory are measured."""
TIMED_PASSES = 9


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of the distinct parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def last_states(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Of each batch the hidden states behind the final norm, (B, T, D)."""
    return [
        hidden_states_at(
            model,
            [model.config.num_hidden_layers],
            batch["input_ids"].to(model.device),
            batch["attention_mask"].to(model.device),
        )[0]
        for batch in batches
    ]


def last_layer_similarity(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    teacher_states: Sequence[Tensor],
) -> float:
    """Mean over tokens of the cosine between a model's last hidden state and its teacher's."""
    total, num_tokens = 0.0, 0
    for batch, states_BTD, teacher_BTD in zip(batches, last_states(model, batches), teacher_states):
        mask_BT = batch["attention_mask"].bool().to(states_BTD.device)
        similarity_BT = cosine_similarity(states_BTD.float(), teacher_BTD.float(), dim=-1)
        total += similarity_BT[mask_BT].double().sum().item()
        num_tokens += int(mask_BT.sum())
    return total / num_tokens


@torch.no_grad()
def speed_and_memory(model: PreTrainedModel) -> dict[str, Any]:
    """Tokens per second of a forward pass (the median of some), and the bytes it takes: weights,
    and the tensors beside them at the peak.
    """
    num_rows, num_tokens = TIMED_SHAPE
    num_tokens = min(num_tokens, getattr(model.config, "max_position_embeddings", num_tokens))
    device = model.device
    ids_BT = torch.arange(num_rows * num_tokens, device=device).reshape(num_rows, num_tokens)
    ids_BT = ids_BT % model.config.vocab_size

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
    return {
        "rows": num_rows,
        "tokens_per_row": num_tokens,
        "tokens_per_second": num_rows * num_tokens / statistics.median(seconds),
        "weights_bytes": weights_bytes(model),
        "peak_beyond_weights_bytes": peak_bytes,
    }


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes that are held at once, of those that were not held before, while `run` runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as live:
        run()
    return live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active, for devices whose allocator does not."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(storage) for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view has the storage of what it looks at, which is no new memory.
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
