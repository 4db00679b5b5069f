"""Faster layers, the same numbers: torch.compile and Liger kernels."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from patching.architectures.lookup import architecture_of
from train.training_args import DistillationArguments


def check_liger_knows(teacher: PreTrainedConfig) -> None:
    """Raise ValueError for an architecture that Liger would leave as it is without a word."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if teacher.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"use_liger_kernel: Liger has no kernels for a {teacher.model_type} model, leave it out"
        )


def speed_up(model: PreTrainedModel, args: DistillationArguments) -> None:
    """Change how a model's layers are computed, in place, as the flags say."""
    if args.use_liger_kernel:
        # Without its losses: they would take the place of the distillation loss.
        own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel(model, (args.liger_kernel_config or {}) | own)
    if args.torch_compile:
        # Layer by layer: one graph serves them all, and what is hooked in between, the hidden
        # states and the gathering of shards, stays outside.
        for layer in model.get_submodule(architecture_of(model.config).layers):
            layer.forward = torch.compile(
                layer.forward, backend=args.torch_compile_backend, mode=args.torch_compile_mode
            )
