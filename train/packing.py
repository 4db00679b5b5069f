"""Check that a teacher can read several documents in one row as if each were alone.

An architecture with a row in the table is known to (tests/test_documents.py). Any other must show
it on a small instance with random weights: attention, recurrence or position ids that ignore where
documents begin change what the instance computes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import flash_attention_mask

from patching.architectures.config import config_for
from patching.architectures.table import ARCHITECTURES
from patching.blocks import LayerMap
from patching.devices import has_no_avx512
from patching.recipe import initial_student
from patching.running.documents import needs_boundaries
from patching.running.hidden_states import hidden_states_at
from patching.running.varlen import VARLEN, is_plain
from train.data_args import Packing
from train.sharding import with_room_for_weights, without_weights

MLP_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
"""Endings of config fields that can be small in an instance that shows what attention sees."""
SMALL_WIDTH = 64
LENGTHS = (5, 8)
"""Tokens of the two documents that the instance reads."""
TOLERANCE = 1e-3
"""Largest difference, relative to the largest number, that rounding in fp32 may cause."""
FLEX = "flex_attention"
RECORDER = "recording_flash_attention"


def check_separates_documents(
    config: PreTrainedConfig, attn_implementation: str | None, max_length: int
) -> None:
    """Raise ValueError, naming the architecture, unless documents in one row do not affect each
    other.
    """
    remedy = "use --packing False, or --packing cross to let documents see each other"
    name = f"packing=documents: a {config.model_type} model"
    if (longest := _longest_fixed_rotary(config)) is not None and max_length > longest:
        raise ValueError(
            f"{name} scales its rotary frequencies by the longest document of a batch beyond "
            f"{longest} tokens; {remedy}, or --max_length {longest}"
        )
    try:
        if config.model_type not in ARCHITECTURES and not _small_instance_separates(config):
            raise ValueError(f"{name} lets a document of a row affect the next one; {remedy}")
        if needs_boundaries(attn_implementation) and not _calls_of_attention(config).are_told:
            raise ValueError(
                f"{name} does not tell {attn_implementation} where documents begin; choose "
                f"--attn_implementation sdpa, or {remedy}"
            )
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{name} could not be checked ({error}); {remedy}") from error


def check_attention(
    attn_implementation: str | None,
    config: PreTrainedConfig,
    packing: Packing,
    device: torch.device,
) -> None:
    """Raise ValueError for attention that cannot be computed as asked."""
    if attn_implementation == VARLEN:
        check_varlen(config, packing)
    if attn_implementation == FLEX:
        check_flex(device)


def check_varlen(config: PreTrainedConfig, packing: Packing) -> None:
    """Raise ValueError unless attention can be computed one document after another."""
    if packing != "documents":
        obstacle = "it is for --packing documents"
    elif not _is_plain(config):
        obstacle = f"it does not compute all of the attention of a {config.model_type} model"
    else:
        return
    raise ValueError(f"attn_implementation={VARLEN}: {obstacle}; choose sdpa, or leave it out")


def check_flex(device: torch.device) -> None:
    """Raise ValueError on a CPU without AVX-512, where PyTorch 2.13 compiles flex attention to
    kernels that are wrong unless a row is a multiple of their blocks.
    """
    if has_no_avx512(device):
        raise ValueError(
            f"attn_implementation={FLEX}: PyTorch's kernels give wrong numbers on a CPU without "
            "AVX-512; choose sdpa, or leave it out"
        )


def _is_plain(config: PreTrainedConfig) -> bool:
    try:
        calls = _calls_of_attention(config)
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError):
        return False
    return calls.are_told and calls.are_plain


def _longest_fixed_rotary(config: PreTrainedConfig) -> int | None:
    """Return up to how many tokens rotary frequencies are fixed, None if they always are."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def _small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a model with one layer of each kind and narrow MLPs."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    kept = tuple(sorted({kinds.index(kind) for kind in kinds}))
    small = config_for(
        initial_student(LayerMap(kept, config.num_hidden_layers)), {"teacher": config}
    )
    for name, value in small.to_dict().items():
        if name.endswith(MLP_WIDTHS) and isinstance(value, int):
            setattr(small, name, min(value, SMALL_WIDTH))
    return small


def _small_instance(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of the small config. Its embeddings are only filled for the tokens it reads,
    so that a large vocabulary takes no memory.
    """
    small = _small_config(config)
    model = with_room_for_weights(without_weights(small, dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tables = [
            module.weight
            for module in model.base_model.modules()
            if isinstance(module, nn.Embedding) and len(module.weight) == small.vocab_size
        ]
        for table in tables:
            table[: sum(LENGTHS)].normal_(generator=generator)
        for parameter in model.base_model.parameters():
            if not any(parameter is table for table in tables):
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
                parameter.normal_(std=scale, generator=generator)
    return model.eval()


def _read_both(model: PreTrainedModel) -> Tensor:
    """Return the last hidden state of two documents in one row."""
    tokens_1T = torch.arange(sum(LENGTHS))[None]
    positions_1T = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    last = model.config.num_hidden_layers
    return hidden_states_at(model, [last], tokens_1T, positions_BT=positions_1T)[0]


@torch.no_grad()
def _small_instance_separates(config: PreTrainedConfig) -> bool:
    """Whether a small instance reads the second document of a row as if it were alone."""
    model = _small_instance(config)
    alone_1T = torch.arange(LENGTHS[0], sum(LENGTHS))[None]
    (alone_1TD,) = hidden_states_at(model, [model.config.num_hidden_layers], alone_1T)
    difference = (_read_both(model)[:, LENGTHS[0] :] - alone_1TD).abs().max()
    return bool(difference <= TOLERANCE * alone_1TD.abs().max())


class AttentionCalls(NamedTuple):
    """What all layers of a small instance pass to attention."""

    are_told: bool
    """Whether they pass on the boundaries of documents."""
    are_plain: bool
    """Whether they ask for nothing that VARLEN does not compute."""


@torch.no_grad()
def _calls_of_attention(config: PreTrainedConfig) -> AttentionCalls:
    """Return what attention is asked for in training, where there may be dropout."""
    told, plain = [], []

    def record(_, query_BHTD, _key, value_BHTD, *_rest, **arguments) -> tuple[Tensor, None]:
        told.append(arguments.get("cu_seq_lens_q") is not None)
        plain.append(is_plain(arguments))
        num_rows, num_heads, length, _ = query_BHTD.shape
        return value_BHTD.new_zeros(num_rows, length, num_heads, value_BHTD.shape[-1]), None

    AttentionInterface.register(RECORDER, record)
    AttentionMaskInterface.register(RECORDER, flash_attention_mask)
    model = _small_instance(config).train()
    model.config._attn_implementation = RECORDER  # transformers would look for its package
    _read_both(model)
    are_plain = all(plain) and model._supports_flash_attn  # which masks of other kinds rule out
    return AttentionCalls(bool(told) and all(told), are_plain)
