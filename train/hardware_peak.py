"""The most FLOPs per second that a device can do. MFU is a run's share of them."""

import functools
import re
import time

import torch

DENSE_BF16_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100 HBM3": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
}
"""The vendor's FLOPs per second of matrix products in bf16 or fp16 without sparsity, by words of
the device's name. The first whose words are all in it counts.
"""
PART_OF_A_GPU = "MIG"
"""A word in the name of a device that has only some of a GPU's units."""
MEASURED_SIZE = 1024
MEASURED_REPEATS = 4


@functools.cache
def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak of a device: the vendor's for known GPUs in half precision, otherwise the
    best rate of a matrix product measured right now.
    """
    peak = None
    if device.type == "cuda" and dtype != torch.float32:
        peak = vendors_peak(torch.cuda.get_device_name(device))
    return measured_flops_per_second(device, dtype) if peak is None else peak


def vendors_peak(name: str) -> float | None:
    """Return the peak of a GPU in half precision by its name, None if it is not known."""
    words = set(re.split(r"[\s-]+", name))
    if PART_OF_A_GPU in words:
        return None
    fitting = (peak for model, peak in DENSE_BF16_PEAKS.items() if words.issuperset(model.split()))
    return next(fitting, None)


def measured_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate of a few matrix products, after one that warms up."""
    size = MEASURED_SIZE * (8 if device.type == "cuda" else 1)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + MEASURED_REPEATS):
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for an accelerator
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
