"""An accelerator that is not there: its tensors say that they are on it and hold their values on
the CPU. An operation on tensors of both devices fails as it would on a GPU.

    python tests/pretended_accelerator.py evaluate.evaluate --teacher_model_name_or_path ...

runs a module with it, which finds it as it would find a GPU. Kernels of their own and memory are
not pretended.
"""

import runpy
import sys
import threading
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
MAY_MIX = ("copy_", "_to_copy", "index", "index_put", "index_put_")
"""Operations that read tensors of the CPU on other devices: copies, and indices."""

_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)


class OnDevice(torch.Tensor):
    """A tensor on the device."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnDevice":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return on_values(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.values})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_) -> "OnDevice":
        return OnDevice(inner["values"])

    def tolist(self) -> list:
        return self.values.tolist()


class Accelerator(TorchDispatchMode):
    """Makes tensors on the device where it is asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return on_values(function, args, kwargs or {})


def on_values(function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values of its tensors. Its results are on the device if it asks for
    that, or else if one of its tensors is. Raises RuntimeError for tensors of two devices.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    elsewhere = [each for each in tensors if each.dim() and not isinstance(each, OnDevice)]
    name = function.overloadpacket.__name__
    if here and elsewhere and name not in MAY_MIX:
        raise RuntimeError(f"{function}: {here[0].shape} is on {DEVICE}, {elsewhere[0].shape} not")
    is_asked = any(isinstance(leaf, torch.device) and leaf.type == NAME for leaf in leaves)
    is_sent_away = not is_asked and any(isinstance(leaf, torch.device) for leaf in leaves)
    is_here = is_asked or (bool(here) and not is_sent_away)
    if name == "copy_":
        is_here = isinstance(args[0], OnDevice)

    def on_cpu(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == NAME:
            return torch.device("cpu")
        return leaf.values if isinstance(leaf, OnDevice) else leaf

    args, kwargs = tree_unflatten(map(on_cpu, leaves), spec)
    results = function(*args, **kwargs)
    same = {id(tensor.values): tensor for tensor in here}  # of operations in place

    def to_device(result: Any) -> Any:
        if not is_here or not isinstance(result, torch.Tensor):
            return result
        return same[id(result)] if id(result) in same else OnDevice(result)

    return tree_map(to_device, results)


def tensor_on_device(make):
    """Wrap a function that makes a tensor of numbers, which PyTorch does without operations."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


def use() -> None:
    """Have every thread of this process use the device from now on."""
    _device_constructors()  # kept at the first call, which must see the functions of PyTorch
    torch.tensor, torch.as_tensor = map(tensor_on_device, (torch.tensor, torch.as_tensor))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device_index"):
        setattr(torch.accelerator, name, lambda *_: None)
    torch.get_device_module(NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    for name in ("memory_allocated", "max_memory_allocated"):
        setattr(torch.accelerator, name, lambda *_: 0)
    torch.__future__.set_swap_module_params_on_conversion(True)
    run = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with Accelerator():
            run(thread)

    threading.Thread.run = run_with_device
    Accelerator().__enter__()


if __name__ == "__main__":
    use()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
