"""When sharded ranks reduce their gradients: after every micro-batch, or once per step where whole
gradients fit in memory.
"""

import torch
from accelerate.utils import gather
from transformers import PreTrainedConfig

from patching.architectures.models import empty_model
from patching.blocks import LayerMap
from train.estimate import MASTER_BYTES, MicroBatch, memory, num_parameters, student_config
from train.training_args import DistillationArguments

SHARE_OF_MEMORY = 0.8
"""Share of a GPU that a run may need by estimate. The rest is for what is not estimated."""


def choose_reduction(
    args: DistillationArguments,
    teacher: PreTrainedConfig,
    layer_map: LayerMap,
    max_length: int,
) -> None:
    """Let sharded ranks reduce gradients once per step if memory allows, in place, unless
    `--accelerator_config` says when. All ranks have to decide the same, so they go by the GPU with
    least memory.
    """
    given = args.accelerator_config.gradient_accumulation_kwargs or {}
    if not args.fsdp or "sync_each_batch" in given:
        return
    fits = False
    if torch.cuda.is_available():
        own_bytes = torch.cuda.get_device_properties(args.device).total_memory
        gpu_bytes = gather(torch.tensor([own_bytes], device=args.device)).min()
        fits = whole_gradients_fit(args, teacher, layer_map, max_length, int(gpu_bytes))
    args.accelerator_config.gradient_accumulation_kwargs = given | {"sync_each_batch": not fits}


def whole_gradients_fit(
    args: DistillationArguments,
    teacher: PreTrainedConfig,
    layer_map: LayerMap,
    max_length: int,
    gpu_bytes: int,
) -> bool:
    """Return whether a rank has room for the gradients of the whole student, in fp32."""
    student = student_config(teacher, layer_map)
    batch = MicroBatch(
        args.per_device_train_batch_size,
        max_length,
        args.compute_dtype,
        bool(args.fsdp_config.get("activation_checkpointing")),
    )
    parts = memory(
        student,
        teacher,
        args.loss_weights,
        batch,
        num_shards=args.world_size // args.fsdp_replicas,
        num_aligned_pairs=len(layer_map.alignment_pairs),
    )
    whole_bytes = MASTER_BYTES * num_parameters(empty_model(student))
    return parts.total - parts.gradients + whole_bytes <= SHARE_OF_MEMORY * gpu_bytes
