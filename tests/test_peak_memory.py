"""Peak memory of a piece of work, and of another process."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from patching.running.peak_memory import peak_bytes_during, peak_resident_bytes, resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20


def peaks_of_work() -> tuple[int, int]:
    """The peak during some work, and the process's peak after it beyond what it holds then."""
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    peak = peak_bytes_during(lambda: torch.ones(len(held) // 2, dtype=torch.uint8))
    return peak, peak_resident_bytes() - resident_bytes()


def test_the_peak_is_that_of_the_work_and_not_of_what_was_held_before():
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # no freed memory to reuse
        peak, beyond_now = pool.apply(peaks_of_work)
    assert 31 * MIB < peak < 40 * MIB
    assert 31 * MIB < beyond_now < 40 * MIB


def test_the_peak_of_another_process():
    code = "x = b'x' * 2**26; del x; print('done', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    assert 64 * MIB < peak_resident_bytes(process.pid) < 128 * MIB
    process.communicate("", timeout=20)
    with pytest.raises(OSError):
        peak_resident_bytes(process.pid)


def test_a_child_that_was_not_waited_for_has_no_memory():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert peak_resident_bytes(process.pid) == 0
    process.wait()
