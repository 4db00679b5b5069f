"""TODO."""

from collections.abc import Iterator

CHUNK_LOGITS = 2**26
"""Entries of the logits that exist at once, per model."""
CPU_SOFTMAX_LOGITS = 2**19
"""Entries turned into probabilities at once on a CPU: their fp32 copies should stay in its
caches.
"""


def slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
