"""Faster layers, the same numbers: torch.compile and Liger kernels."""

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from patching.families import family_of
from train.training_args import DistillationArguments


def speed_up(model: PreTrainedModel, args: DistillationArguments) -> None:
    """Change how a model's layers are computed, in place, as the flags say."""
    if args.use_liger_kernel:
        # Without its losses: they would take the place of the distillation loss.
        own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        apply_liger_kernel(model, (args.liger_kernel_config or {}) | own)
    if args.torch_compile:
        # Layer by layer: one graph serves them all, and what is hooked in between, the hidden
        # states and the gathering of shards, stays outside.
        for layer in model.get_submodule(family_of(model.config).layers):
            layer.forward = torch.compile(
                layer.forward, backend=args.torch_compile_backend, mode=args.torch_compile_mode
            )
