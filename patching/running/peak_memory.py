"""Peak memory of a process, or of one piece of work in it.

The accelerator's allocator keeps its own peak. On a CPU the peak is that of resident memory, which
includes libraries and memory-mapped weights files.
"""

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes() -> int:
    """The most memory this process has held, on the accelerator if there is one, else resident."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes(process: int | str = "self") -> int:
    """The most resident memory of this process, or on Linux of the one with that id.

    Returns 0 for a child that has ended and was not waited for.
    """
    if sys.platform == "linux":
        # ru_maxrss is no use here: a new process inherits the peak of the one that started it.
        return _status_bytes("VmHWM", process)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int:
    """The resident memory of this process now (Linux only)."""
    return _status_bytes("VmRSS")


def peak_bytes_during(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Run `work` and return the most memory it held beyond what was held before.

    For a CPU that is resident memory (Linux only), else the memory of the accelerator `device`.
    """
    if torch.device(device).type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_bytes()
        work()
        return peak_resident_bytes() - before
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    work()
    return torch.accelerator.max_memory_allocated(device) - before


def _status_bytes(name: str, process: int | str = "self") -> int:
    status = Path("/proc", str(process), "status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0  # a zombie has no memory
