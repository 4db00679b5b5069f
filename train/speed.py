"""Faster layers that compute the same: torch.compile, Liger kernels, and memory that is reused."""

import ctypes
import platform
import shutil

import torch
import torch._inductor.config as inductor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from patching.architectures.lookup import architecture_of
from patching.blocks import LayerMap
from train.estimate import flops_per_token, student_config
from train.training_args import DistillationArguments

LONG_RUN_FLOPS = 1e15
"""FLOPs of a run that is compiled on a CPU by default. Compiling takes a minute or two, which this
many are worth on a fast machine, too.
"""

VARIANTS = 64
"""Variants of a layer that may be compiled: kinds of attention, student and teacher, training and
evaluation, kinds of mask, shapes. Beyond its limit dynamo would run layers eagerly.
"""


def check_liger_knows(teacher: PreTrainedConfig) -> None:
    """Raise ValueError for an architecture without Liger kernels, which Liger silently ignores."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if teacher.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"use_liger_kernel: Liger has no kernels for a {teacher.model_type} model, leave it out"
        )


def compile_if_long(
    args: DistillationArguments,
    teacher: PreTrainedConfig,
    layer_map: LayerMap,
    num_tokens: float,
    max_length: int,
    has_cache: bool,
) -> bool:
    """Let a long run on a CPU with a C++ compiler be compiled, in place, unless `--torch_compile`
    was given. Return whether it is. What cannot be compiled then runs as it is.
    """
    if not args.compiles_if_long or not any(map(shutil.which, filter(None, inductor.cpp.cxx))):
        return False
    student, of_cache = student_config(teacher, layer_map), None if has_cache else teacher
    flops = flops_per_token(student, of_cache, args.loss_weights).at(max_length) * num_tokens
    if flops < LONG_RUN_FLOPS:
        return False
    args.torch_compile, args.torch_compile_backend = True, "inductor"
    torch._dynamo.config.suppress_errors = True
    return True


def speed_up(model: PreTrainedModel, args: DistillationArguments) -> None:
    """Change in place how a model's layers are computed, as the flags ask."""
    if args.use_liger_kernel:
        # Without Liger's losses, which would replace the distillation loss.
        no_losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel(model, (args.liger_kernel_config or {}) | no_losses)
    if args.torch_compile:
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        # Layer by layer: all layers share one graph, and the hooks between them, which compare
        # hidden states and gather shards, stay outside of it.
        for layer in model.get_submodule(architecture_of(model.config).layers):
            layer.forward = torch.compile(
                layer.forward, backend=args.torch_compile_backend, mode=args.torch_compile_mode
            )


def reuse_freed_memory() -> None:
    """Make the C library keep what this process frees, for its next allocations.

    It would return tensors of many megabytes to the system at once. A step on a CPU then spends up
    to a quarter of its time on pages of new memory. Only glibc can be told.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
