"""What a run needs, estimated from configs: parameters, FLOPs and memory by part."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.config import config_for
from patching.architectures.lookup import architecture_of
from patching.architectures.models import auto_class, empty_model, predicts_masked_tokens
from patching.blocks import LayerMap, Order
from patching.checkpoints.layout import layout_of
from patching.checkpoints.sizes import Size, size_of
from patching.recipe import initial_student, intermediate_model
from patching.running.chunks import CHUNK_LOGITS, CPU_SOFTMAX_LOGITS, CUDA_CHUNK_LOGITS
from train.loss_weights import LossWeights
from train.masking import SHARE_OF_TARGETS
from train.optimizer_memory import optimizer_bytes

MASTER_BYTES = 4
"""Bytes per weight and per gradient, both in fp32."""


class TokenFlops(NamedTuple):
    """FLOPs of the matrix products for one token."""

    layers: int
    attention_per_position: int
    """Queries with keys and probabilities with values, per position of the token's row."""
    head: int

    def at(self, num_positions: float) -> float:
        """Return the FLOPs for one token in a row of `num_positions`."""
        return self.layers + self.attention_per_position * num_positions + self.head

    def of_batch(self, batch: Mapping[str, Any]) -> int:
        """Return the FLOPs for a batch, whose documents do not see each other if it has their
        positions, and for whose targets alone heads run if they are few.
        """
        labels_BT, positions_BT = batch["labels"], batch.get("position_ids")
        flops, length = self, labels_BT.shape[1]
        if positions_BT is not None:  # the mean length of documents, counted by their tokens
            length = 2 * positions_BT.float().mean().item() + 1
        if batch.get("few_targets"):
            flops = self._replace(head=self.head * (labels_BT >= 0).float().mean().item())
        return round(flops.at(length) * labels_BT.numel())


def flops_per_token(
    student: PreTrainedConfig, teacher: PreTrainedConfig | None, weights: LossWeights
) -> TokenFlops:
    """Return the FLOPs of training on one token: student forward and backward, teacher forward. The
    teacher is None if its predictions come from a cache.

    What activation checkpointing recomputes is not counted.
    """
    student_forward = forward_flops(student)
    teacher_forward = TokenFlops(0, 0, 0) if teacher is None else forward_flops(teacher)
    return TokenFlops(
        3 * student_forward.layers + teacher_forward.layers,
        3 * student_forward.attention_per_position + teacher_forward.attention_per_position,
        3 * student_forward.head * weights.needs_logits + teacher_forward.head * bool(weights.kl),
    )


def forward_flops(config: PreTrainedConfig) -> TokenFlops:
    """Return the FLOPs of a forward pass for one token, counting only the experts it uses."""
    flops = {part: cost.flops for part, cost in layout_of(config, torch.float32).costs.items()}
    head = flops.pop("head")
    config = config.get_text_config()
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    # Two products of 2 FLOPs each, halved: on average a token attends to half of its row.
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head_size
    return TokenFlops(sum(flops.values()), attention, round(head * share_of_targets(config)))


def share_of_targets(config: PreTrainedConfig) -> float:
    """Return the share of positions that predict a token, and at which the heads run."""
    return SHARE_OF_TARGETS if predicts_masked_tokens(config) else 1.0


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(teacher: PreTrainedConfig, layer_map: LayerMap, order: Order) -> list[Size]:
    """Return every size between student and teacher, k = 0 first, as saved in fp32."""
    configs = {"teacher": teacher, "student": student_config(teacher, layer_map)}
    layouts = {parent: layout_of(config, torch.float32) for parent, config in configs.items()}
    return [
        size_of(intermediate_model(layer_map, k, order), layouts, sys.maxsize)
        for k in range(layer_map.max_layers_to_patch + 1)
    ]


def student_config(teacher: PreTrainedConfig, layer_map: LayerMap) -> PreTrainedConfig:
    return config_for(initial_student(layer_map), {"teacher": teacher})


class MicroBatch(NamedTuple):
    """What a rank computes at once. `dtype` is that of its matrix products."""

    num_rows: int
    num_positions: int
    dtype: torch.dtype
    activation_checkpointing: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_positions


class Memory(NamedTuple):
    """Bytes on one rank by part, at the moment when most is in use: when the last micro-batch of a
    step reaches the loss.
    """

    weights: int
    gradients: int
    buckets: int
    """Copies of the gradients that data parallelism without sharding averages."""
    optimizer: int
    teacher: int
    gathered: int
    """Whole heads of sharded models, and a layer."""
    activations: int
    """What the student keeps for its backward pass, and the gradients of the cosine term."""
    loss: int
    """Chunks of logits, the heads in the dtype of the products, and the gradient of the head."""

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
    num_replicas: int = 1,
    optimizer: str = "adamw_torch_fused",
    optimizer_options: str | None = None,
) -> Memory:
    """Estimate the memory of training. `num_shards` is 1 if models are not sharded, and
    `num_replicas` counts the ranks that hold whole models. `optimizer` is a value of `--optim`.
    """
    student_model, teacher_model = empty_model(student), empty_model(teacher)
    is_sharded = num_shards > 1
    shard_bytes = MASTER_BYTES * num_parameters(student_model) // num_shards
    states = optimizer_bytes(student_model, optimizer, optimizer_options)
    return Memory(
        weights=shard_bytes,
        gradients=shard_bytes,
        buckets=shard_bytes * (num_replicas > 1),
        optimizer=states // num_shards,
        teacher=batch.dtype.itemsize * num_parameters(teacher_model) // num_shards,
        gathered=_gathered_bytes(student_model, teacher_model, batch) * is_sharded,
        activations=_activation_bytes(student, weights, batch, is_sharded, num_aligned_pairs),
        loss=_loss_bytes(student_model, weights, batch, is_sharded, is_cpu),
    )


def _gathered_bytes(student: PreTrainedModel, teacher: PreTrainedModel, batch: MicroBatch) -> int:
    """Return the bytes that two sharded models have gathered when the loss is computed: both heads,
    each gathered along with its final norm, and the buffer that the last layer was gathered in,
    which FSDP keeps until it gathers again. The input embedding has been released by then.
    """
    largest_layer = max(
        num_parameters(layer)
        for model in (student, teacher)
        for layer in model.get_submodule(architecture_of(model.config).layers)
    )
    heads = sum(model.get_output_embeddings().weight.numel() for model in (student, teacher))
    return batch.dtype.itemsize * (heads + largest_layer)


def _activation_bytes(
    student: PreTrainedConfig,
    weights: LossWeights,
    batch: MicroBatch,
    is_sharded: bool,
    num_aligned_pairs: int,
) -> int:
    num_bytes = saved_for_backward_bytes(student, batch, is_sharded)
    if batch.activation_checkpointing:  # the backward pass recomputes one layer at a time
        without = batch._replace(activation_checkpointing=False)
        all_layers = saved_for_backward_bytes(student, without, is_sharded)
        num_bytes += all_layers // student.get_text_config().num_hidden_layers
    if weights.cosine:
        state_bytes = batch.dtype.itemsize if is_sharded else MASTER_BYTES
        num_bytes += (
            num_aligned_pairs
            * batch.num_tokens
            * student.get_text_config().hidden_size
            * state_bytes
        )
    return num_bytes


def _loss_bytes(
    student: PreTrainedModel,
    weights: LossWeights,
    batch: MicroBatch,
    is_sharded: bool,
    is_cpu: bool,
) -> int:
    """Return the bytes of `train.vocabulary_loss`."""
    if not weights.needs_logits:
        return 0
    head, config = student.get_output_embeddings().weight, student.config
    bytes_each = batch.dtype.itemsize
    state_bytes = bytes_each if is_sharded else MASTER_BYTES
    num_targets = round(batch.num_tokens * share_of_targets(config))
    num_logits = min(num_targets * len(head), CHUNK_LOGITS if is_cpu else CUDA_CHUNK_LOGITS)
    num_softmax_logits = min(num_logits, CPU_SOFTMAX_LOGITS if is_cpu else CHUNK_LOGITS)
    num_models = 1 + bool(weights.kl)
    num_bytes = num_models * num_logits * bytes_each
    num_bytes += (2 * num_models - 1) * num_softmax_logits * 4
    num_bytes += MASTER_BYTES * head.numel()
    if batch.dtype != torch.float32:
        num_bytes += bytes_each * head.numel() * (1 if is_sharded else 2)
    return num_bytes + num_targets * config.get_text_config().hidden_size * (
        bytes_each * num_models + 2 * state_bytes
    )


def saved_for_backward_bytes(config: PreTrainedConfig, batch: MicroBatch, is_sharded: bool) -> int:
    """Return the bytes that autograd keeps of a forward pass without the head, from a run with
    tensors that have shapes and dtypes but no data.

    They are a few percent too many: without data, attention keeps a mask and repeats grouped keys
    and values. Experts are computed as groups whose sizes are data, not shapes.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    autocast = torch.autocast(
        "cpu", batch.dtype, enabled=not is_sharded and batch.dtype != torch.float32
    )
    # A kernel without data checks dtypes that the real ones do not have.
    groups = mock.patch("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    with FakeTensorMode(), autocast, groups:
        # Sharded layers have their weights gathered in the dtype of the products, so they use no
        # autocast.
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
