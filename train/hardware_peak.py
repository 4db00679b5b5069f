"""The most FLOPs per second that a device can do. MFU is a run's share of them."""

import functools
import time

import torch

DENSE_BF16_PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
}
"""The vendor's FLOPs per second of matrix products in bf16 or fp16 without sparsity, by a part of
the device's name. The first that fits counts.
"""
MEASURED_SIZE = 1024
MEASURED_REPEATS = 4


@functools.cache
def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak of a device: the vendor's for known GPUs in half precision, otherwise the
    best rate of a matrix product measured right now.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in DENSE_BF16_PEAKS.items():
            if part in name:
                return peak
    return measured_flops_per_second(device, dtype)


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
