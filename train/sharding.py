"""FSDP2 for student and teacher: each rank holds a share of both and gathers a layer to run it.

accelerate shards the student together with its optimizer. The frozen teacher has no optimizer, so
it is sharded here, by the same function. Only the first rank reads weights, and the others receive
their shares from it. With several replicas, the ranks of a node, for example, share one copy, and
only gradients are summed between nodes.
"""

from typing import Any

import torch
from accelerate import Accelerator, ParallelismConfig, init_empty_weights
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.models import auto_class
from train.training_args import DistillationArguments


def check_replicas(args: DistillationArguments, num_ranks: int) -> None:
    """Raise ValueError unless the ranks form as many groups of at least two as asked for."""
    if args.fsdp_replicas == 1:
        return
    if not args.fsdp:
        raise ValueError(
            f"fsdp_replicas={args.fsdp_replicas}: it needs --fsdp_config and ranks that shard"
        )
    if num_ranks % args.fsdp_replicas or num_ranks // args.fsdp_replicas < 2:
        raise ValueError(
            f"fsdp_replicas={args.fsdp_replicas}: {num_ranks} ranks do not form so many groups of "
            "two or more, choose a divisor of the ranks, such as the number of nodes"
        )


def parallelism(num_replicas: int, num_ranks: int) -> dict[str, ParallelismConfig]:
    """Return accelerate's settings for groups of ranks that each hold a whole sharded copy (HSDP),
    none if all ranks share one copy.
    """
    if num_replicas == 1:
        return {}
    sizes = {"dp_replicate_size": num_replicas, "dp_shard_size": num_ranks // num_replicas}
    return {"parallelism_config": ParallelismConfig(**sizes)}


def reads_weights(args: DistillationArguments) -> bool:
    """Whether this rank reads the teacher's weights. Of sharded ranks only the first does, unless
    `cpu_ram_efficient_loading` is off.
    """
    first_reads_for_all = bool(args.fsdp) and args.fsdp_plugin_args["cpu_ram_efficient_loading"]
    return args.process_index == 0 or not first_reads_for_all


def without_weights(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Return a model for a rank that receives its weights: parameters are on the meta device, and
    buffers that no checkpoint holds, such as rotary frequencies, are real.
    """
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, **kwargs)
    model.tie_weights()
    return model


def with_room_for_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a model's meta parameters by uninitialized ones on the CPU.

    Sharding tells parameters apart by their addresses and fills in the shares later. The memory is
    never touched before, so the system does not provide it.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                room = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(room, parameter.requires_grad))
    model.tie_weights()
    return model


def place_teacher(
    accelerator: Accelerator, teacher: PreTrainedModel | None, dtype: torch.dtype
) -> None:
    """Shard the teacher, if there is one and the student will be sharded, else move it to the
    accelerator's device.

    Sharded models gather weights and run layers in `dtype`, and sum gradients in fp32.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if teacher is not None:
            teacher.to(accelerator.device)
        return
    if dtype != torch.float32:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32
        )
    if teacher is not None:
        fsdp2_prepare_model(accelerator, teacher)


def gather(head: nn.Module) -> None:
    """Gather a sharded head whose weight is about to be read without calling the head.

    A causal model needs no such call: its head is gathered together with its final norm.
    """
    if isinstance(head, FSDPModule):
        head.unshard()


def keep_gathered(head: nn.Module, keeps: bool) -> None:
    """Let a sharded head, and the final norm that is gathered along with it, stay whole after the
    backward pass, for the next micro-batch of an optimizer step, or release it then.

    This needs no more memory than the loss does: the head is whole there in any case.
    """
    if isinstance(head, FSDPModule):
        head.set_reshard_after_backward(not keeps, recurse=False)


def release(head: nn.Module) -> None:
    """Release a gathered head. Without a backward pass FSDP does not do so itself."""
    if isinstance(head, FSDPModule):
        head.reshard()
