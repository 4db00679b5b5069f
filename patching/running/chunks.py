"""Logits in chunks that fit in memory, and their softmax in chunks that fit in a CPU's caches.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_LOGITS = 2**26
"""Logits that exist at once, per model."""
CUDA_CHUNK_LOGITS = 2**28
"""The same in training on a CUDA GPU, where each chunk adds to the gradient of a large head."""
CPU_SOFTMAX_LOGITS = 2**17 * torch.get_num_threads()
"""Logits that go through a softmax at once on a CPU, few enough that their fp32 copies stay in the
caches of its cores.
"""
CPU_TOP_TOKEN_LOGITS = 4 * CPU_SOFTMAX_LOGITS
"""The same where a teacher's prediction is its most probable tokens: there is one fp32 copy instead
of three, and there are many short passes over these tokens.
"""


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut range(length) into consecutive slices of `step` entries, of at least one each."""
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def even_slices(length: int, step: int) -> Iterator[slice]:
    """Cut range(length) into slices of nearly equal length, at most a tenth above `step`. No short
    rest is left, which would cost as much as a whole slice where each has work of its own.
    """
    longest = max(1, step) * 11 // 10
    num_slices = max(1, -(-length // longest))
    return slices(length, -(-length // num_slices))


def log_normalizers(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp(logits))) and the greatest logit of each token, both fp32 of shape (N,).

    A log-probability is a logit minus the first of these.
    """
    at_once = CPU_SOFTMAX_LOGITS if logits_NV.device.type == "cpu" else CHUNK_LOGITS
    parts = []
    for rows in slices(len(logits_NV), at_once // logits_NV.shape[-1]):
        part_NV = logits_NV[rows].float()
        greatest_N1 = part_NV.amax(-1, keepdim=True)
        sums_N = torch.sub(part_NV, greatest_N1).exp_().sum(-1)
        parts.append((sums_N.log() + greatest_N1[:, 0], greatest_N1[:, 0]))
    log_sums, greatest = zip(*parts)
    return torch.cat(log_sums), torch.cat(greatest)
