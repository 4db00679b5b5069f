"""Which device models run on, and the dtypes that are slow on it."""

import warnings

import torch


def usable_device(name: str | None) -> torch.device:
    """The named device, by default the accelerator if there is one. Raises ValueError if this
    machine does not have it.
    """
    if name is None:
        # PyTorch may be built for an accelerator that this machine does not have.
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here: {reason}") from error


def has_no_avx512(device: torch.device) -> bool:
    """Whether a device is a CPU without AVX-512. On one, PyTorch's products in bf16 and fp16 took
    about 100 times as long as those in fp32.
    """
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def warn_if_slow(device: torch.device, dtype: torch.dtype, remedy: str) -> None:
    """Warn of a dtype in which models run many times slower on this device than in fp32. `remedy`
    is the flag that helps.
    """
    if dtype != torch.float32 and has_no_avx512(device):
        warnings.warn(
            "on this CPU, products in half precision take many times as long as in fp32: try "
            f"{remedy}",
            stacklevel=3,
        )
