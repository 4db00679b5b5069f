"""How many logits are held in memory at once, and how to cut a range into chunks of that size."""

from collections.abc import Iterator

CHUNK_LOGITS = 2**26
"""Logits that exist at once, per model."""
CPU_SOFTMAX_LOGITS = 2**19
"""Logits that go through a softmax at once on a CPU, few enough that their fp32 copies stay in its
caches.
"""


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut range(length) into consecutive slices of `step` entries, of at least one each."""
    step = max(1, step)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
