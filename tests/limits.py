"""Limits for code that reads what a stranger wrote: no hang, no allocation without bound."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MORE_BYTES = 3 * 2**30
"""What a block may allocate, mostly for libraries that it is the first to import."""


@contextmanager
def bounded(seconds: int = 120, more_bytes: int = MORE_BYTES) -> Iterator[None]:
    """Fail a block that hangs, and let it allocate `more_bytes` at most."""

    def stop(*_) -> None:
        pytest.fail(f"it hangs: {seconds} seconds have passed")

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
