"""FSDP2 for student and teacher: each rank holds its share of both, and gathers a layer when it runs.

accelerate shards the student beside its optimiser. The frozen teacher has none, so it is sharded
here by the same function. Only one rank of a node reads weights; the others receive their shares.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel


def load_on_one_rank_only() -> None:
    """Let `from_pretrained` read weights on one rank of a node and leave them on the meta device on
    the others.
    """
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"


def with_room_for_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with parameters of its own in place of those on the meta device.

    Their memory is named but never touched, so it is not taken up: sharding needs different
    addresses for different parameters, and fills in the shares.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                room = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(room, parameter.requires_grad))
    model.tie_weights()
    return model


def compute_in(accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Gather weights and run layers in `dtype`; sum gradients, and return the loss, in fp32."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32
    )


def shard_teacher(accelerator: Accelerator, teacher: PreTrainedModel) -> PreTrainedModel:
    return fsdp2_prepare_model(accelerator, teacher)


def release(head: nn.Module) -> None:
    """Give back a teacher's head, which stays gathered behind its forward pass."""
    if isinstance(head, FSDPModule):
        head.reshard()
