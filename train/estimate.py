"""What a run will take, worked out from configs: parameters, FLOPs, memory by part."""

import resource
import sys
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from patching.families import family_of
from train.losses import LossWeights


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
    """FLOPs of one token's way through a model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = model.get_submodule(family_of(config).layers)
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.dim() == 2)
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    # A token sees half the positions of its row on average: half of 2 products of 2 FLOPs.
    attention = len(layers) * 2 * config.num_attention_heads * head_size
    return TokenFlops(2 * matrices, attention, 2 * model.get_output_embeddings().weight.numel())


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the accelerator where there is one, else at all."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
