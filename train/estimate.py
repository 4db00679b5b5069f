"""What a run takes, worked out from configs: parameters, FLOPs and memory by part."""

import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from patching.architectures.config import config_for
from patching.architectures.lookup import architecture_of
from patching.architectures.models import auto_class, empty_model, predicts_masked_tokens
from patching.blocks import LayerMap, Order
from patching.checkpoints.layout import layout_of
from patching.checkpoints.sizes import Size, size_of
from patching.recipe import initial_student, intermediate_model
from train import vocabulary_loss as divergence
from train.loss import LossWeights
from train.masking import SHARE_OF_TARGETS

MASTER_BYTES = 4
"""Bytes of a weight, a gradient and each of AdamW's two moments: fp32."""


class TokenFlops(NamedTuple):
    """FLOPs of the matrix products that one token takes."""

    layers: int
    attention_per_position: int
    """Queries with keys and probabilities with values, for each position of a row."""
    head: int

    def at(self, num_positions: int) -> int:
        """For a token of a row of `num_positions`."""
        return self.layers + self.attention_per_position * num_positions + self.head


def flops_per_token(
    student: PreTrainedConfig, teacher: PreTrainedConfig, weights: LossWeights
) -> TokenFlops:
    """FLOPs of a token of training: the student forward and backward, the teacher forward.

    What activation checkpointing computes again does not count.
    """
    student_forward, teacher_forward = forward_flops(student), forward_flops(teacher)
    return TokenFlops(
        3 * student_forward.layers + teacher_forward.layers,
        3 * student_forward.attention_per_position + teacher_forward.attention_per_position,
        3 * student_forward.head * weights.needs_logits + teacher_forward.head * bool(weights.kl),
    )


def forward_flops(config: PreTrainedConfig) -> TokenFlops:
    """FLOPs of one token's way through a model; experts that are not asked do not count."""
    flops = {part: cost.flops for part, cost in layout_of(config, torch.float32).costs.items()}
    head = flops.pop("head")
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    # A token sees half the positions of its row on average: half of 2 products of 2 FLOPs.
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head_size
    return TokenFlops(sum(flops.values()), attention, round(head * share_of_targets(config)))


def share_of_targets(config: PreTrainedConfig) -> float:
    """Of a row's positions those that predict something, and that a head runs at."""
    return SHARE_OF_TARGETS if predicts_masked_tokens(config) else 1.0


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(teacher: PreTrainedConfig, layer_map: LayerMap, order: Order) -> list[Size]:
    """Every size between student and teacher, k = 0 first, as it would be saved in fp32."""
    configs = {"teacher": teacher, "student": student_config(teacher, layer_map)}
    layouts = {parent: layout_of(config, torch.float32) for parent, config in configs.items()}
    return [
        size_of(intermediate_model(layer_map, k, order), layouts, torch.float32, sys.maxsize)
        for k in range(layer_map.max_layers_to_patch + 1)
    ]


def student_config(teacher: PreTrainedConfig, layer_map: LayerMap) -> PreTrainedConfig:
    return config_for(initial_student(layer_map), {"teacher": teacher})


class MicroBatch(NamedTuple):
    """What a rank computes at once."""

    num_rows: int
    num_positions: int
    dtype: torch.dtype
    """Of the matrix products."""
    activation_checkpointing: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_positions


class Memory(NamedTuple):
    """Bytes on one rank, by part. The parts are there together when a step's last micro-batches
    reach the loss.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int
    """Layers and heads that a sharded model has whole for the time being."""
    activations: int
    """What the student keeps for its backward pass, and the gradients of the cosine term."""
    loss: int
    """Chunks of logits, the head in the dtype of the products, and its gradient."""

    @property
    def total(self) -> int:
        return sum(self)


def memory(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    weights: LossWeights,
    batch: MicroBatch,
    num_shards: int,
    num_aligned_pairs: int,
    is_cpu: bool = False,
) -> Memory:
    """An estimate for AdamW, with `num_shards` 1 where models are not sharded."""
    student_model, teacher_model = empty_model(student), empty_model(teacher)
    num_student, num_teacher = num_parameters(student_model), num_parameters(teacher_model)
    hidden_size, bytes_each = student.hidden_size, batch.dtype.itemsize
    state_bytes = bytes_each if num_shards > 1 else MASTER_BYTES
    head = student_model.get_output_embeddings().weight

    gathered = 0
    if num_shards > 1:
        layers = [
            max(map(num_parameters, model.get_submodule(architecture_of(model.config).layers)))
            for model in (student_model, teacher_model)
        ]
        # Two layers, as the next is gathered while one runs; embedding, head and their gradients.
        embeddings = head.numel() * (2 - student.tie_word_embeddings)
        gathered = bytes_each * (2 * max(layers) + 2 * embeddings + head.numel() * bool(weights.kl))

    activations = saved_for_backward_bytes(student, batch, is_sharded=num_shards > 1)
    if batch.activation_checkpointing:  # one layer's are computed again at a time
        without = batch._replace(activation_checkpointing=False)
        all_layers = saved_for_backward_bytes(student, without, is_sharded=num_shards > 1)
        activations += all_layers // student.num_hidden_layers
    if weights.cosine:
        activations += num_aligned_pairs * batch.num_tokens * hidden_size * state_bytes

    loss = 0
    if weights.needs_logits:
        vocab_size = len(head)
        num_targets = round(batch.num_tokens * share_of_targets(student))
        num_logits = min(num_targets * vocab_size, divergence.CHUNK_LOGITS)
        at_once = min(num_logits, divergence.CPU_SOFTMAX_LOGITS if is_cpu else num_logits)
        num_models = 1 + bool(weights.kl)
        loss += num_models * num_logits * bytes_each + (1 + 2 * num_models) * at_once * 4
        loss += MASTER_BYTES * head.numel()
        if batch.dtype != torch.float32:
            loss += bytes_each * head.numel() * (1 if num_shards > 1 else 2)
        loss += num_targets * hidden_size * (bytes_each * num_models + state_bytes * 2)
    return Memory(
        weights=MASTER_BYTES * num_student // num_shards,
        gradients=MASTER_BYTES * num_student // num_shards,
        optimizer=2 * MASTER_BYTES * num_student // num_shards,
        teacher=bytes_each * num_teacher // num_shards,
        gathered=gathered,
        activations=activations,
        loss=loss,
    )


def saved_for_backward_bytes(config: PreTrainedConfig, batch: MicroBatch, is_sharded: bool) -> int:
    """What autograd keeps of a forward pass without the head: run with tensors that have shapes
    and dtypes but no data.

    Some percent too many: run so, attention keeps a mask and repeats grouped keys and values.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    autocast = torch.autocast(
        "cpu", batch.dtype, enabled=not is_sharded and batch.dtype != torch.float32
    )
    with FakeTensorMode(), autocast:
        # Sharded layers gather their weights in the dtype of the products, without autocast.
        model = (
            auto_class(config)
            .from_config(config, dtype=batch.dtype if is_sharded else torch.float32)
            .train()
        )
        if batch.activation_checkpointing:
            model.activation_checkpointing_enable()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids_BT = torch.zeros((batch.num_rows, batch.num_positions), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=ids_BT, use_cache=False)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the accelerator where there is one, else at all."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    if sys.platform == "linux":
        # Not ru_maxrss: a new process inherits there the peak of the one that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
