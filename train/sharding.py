"""FSDP2 for student and teacher: a rank holds its share of both and gathers a layer when it runs.

accelerate shards the student beside its optimiser. The frozen teacher has none, so it is sharded
here by the same function. The first rank alone reads weights; the others receive their shares.
"""

from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.models import auto_class, empty_model
from train.training_args import DistillationArguments


def check_layer_classes(fsdp_config: dict[str, Any], teacher: PreTrainedConfig) -> None:
    """Raise ValueError where the layers to shard are those of another architecture."""
    wanted = set(fsdp_config.get("transformer_layer_cls_to_wrap") or ())
    if missing := wanted - {type(module).__name__ for module in empty_model(teacher).modules()}:
        raise ValueError(
            f"fsdp_config: a {teacher.model_type} model has no {', '.join(sorted(missing))}, "
            "give the teacher itself as --fsdp_config"
        )


def reads_weights(args: DistillationArguments) -> bool:
    """Whether this rank reads the teacher's weights; of sharded ranks the first does it for all,
    unless `cpu_ram_efficient_loading` is off.
    """
    one_for_all = bool(args.fsdp) and args.fsdp_plugin_args["cpu_ram_efficient_loading"]
    return args.process_index == 0 or not one_for_all


def without_weights(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A model whose parameters are on the meta device, for ranks that receive them; what is in no
    checkpoint, such as rotary frequencies, is there.
    """
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, **kwargs)
    model.tie_weights()
    return model


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


def gather(head: nn.Module) -> None:
    """Make a head whole whose weight is read though neither it nor a final norm before it, which
    would gather it too, is called: an encoder's.
    """
    if isinstance(head, FSDPModule):
        head.unshard()


def release(head: nn.Module) -> None:
    """Give back a head, which stays gathered behind a forward pass that has no backward pass."""
    if isinstance(head, FSDPModule):
        head.reshard()
