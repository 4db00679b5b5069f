"""`torchrun ... tests/measured_memory.py FOLDER ...`: train.train with its peak memory measured.

The peak is the most memory torch had allocated at once. Unlike resident memory, that does not
depend on other work of the system. With SHARDED=1 the models are sharded, as in shard_on_cpu.py.

A profiler counts what its own thread allocates and frees. The buffers of a collective are freed by
whichever thread lets go of them last, which may be one of gloo's, and a buffer that such a thread
freed would count forever. So torch is told to count in all threads.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from train.train import main


def peak_bytes_of(words: list[str]) -> int:
    """Run train.train and return the most bytes it had allocated at once."""
    gc.collect()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    all_threads = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    all_threads.value = True
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        main(words)
    all_threads.value = False
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    allocated = [change["args"]["Total Allocated"] for change in changes]
    return max(allocated) - (allocated[0] - changes[0]["args"]["Bytes"])


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    if os.environ.get("SHARDED") == "1":
        from shard_on_cpu import shard_on_cpu

        shard_on_cpu()
    Path(folder, f"peak_{os.environ['RANK']}.json").write_text(json.dumps(peak_bytes_of(words)))
