"""Several documents in one row that do not see each other.

Position ids start over with each document of a row, and attention stops at its boundaries. For
causal models transformers derives the mask from the position ids. Two cases are handled here: flash
attention, which is told where documents begin (transformers would only look where a batch has a
single row), and models whose masks ignore position ids, such as encoders.

On an accelerator the host must not wait for the number of documents, because the device then runs
out of work. Whoever copies a batch there can count them before, as `num_documents`.

Shapes: B rows, T positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)
from transformers.utils.generic import is_flash_attention_requested

from patching.architectures.lookup import architecture_of, first_position
from patching.architectures.models import predicts_masked_tokens
from patching.running.varlen import VARLEN


def separate_documents(
    model: PreTrainedModel, positions_BT: Tensor, num_documents: int | None = None
) -> dict[str, Any]:
    """Return the arguments of a forward pass in which each document of a row is on its own.

    `positions_BT` count from 0 at the first token of each document. Padding is a document too.
    `num_documents` is how many there are, counted here if it is not given.
    """
    config, is_start_BT = model.config, positions_BT == 0
    arguments: dict[str, Any] = {"position_ids": positions_BT + first_position(config)}
    if needs_boundaries(config._attn_implementation):
        return arguments | _flash_arguments(is_start_BT, num_documents)
    if not architecture_of(config).masks_by_position:
        num_rows, length = positions_BT.shape
        sees = packed_sequence_mask_function(is_start_BT.cumsum(-1))
        if not predicts_masked_tokens(config):
            sees = and_masks(causal_mask_function, sees)
        arguments["attention_mask"] = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=num_rows,
            q_length=length,
            kv_length=length,
            mask_function=sees,
            allow_is_causal_skip=False,
            dtype=model.get_input_embeddings().weight.dtype,
            device=positions_BT.device,
        )
    return arguments


def needs_boundaries(attn_implementation: str | None) -> bool:
    """Whether attention is told where documents begin and end, and gets no mask."""
    return attn_implementation == VARLEN or is_flash_attention_requested(None, attn_implementation)


def attention_of_whole_texts(attn_implementation: str | None) -> str | None:
    """Return the attention for texts that have rows, and maybe padding, of their own: what was
    asked for, or transformers' choice in place of kernels that compute in half precision alone.
    """
    return None if needs_boundaries(attn_implementation) else attn_implementation


@contextmanager
def boundaries_known(positions_BT: Tensor | None, num_documents: int | None) -> Iterator[None]:
    """Spare transformers' masks a look at the position ids, for which the host would wait: rows
    without `positions_BT` are one document each, and others have `num_documents`. If that is not
    given, transformers looks.
    """
    if positions_BT is not None and num_documents is None:
        yield
        return
    document_BT = None
    if positions_BT is not None and num_documents > len(positions_BT):
        document_BT = (positions_BT == 0).cumsum(-1)
    name = "transformers.masking_utils.find_packed_sequence_indices"
    with mock.patch(name, lambda _: document_BT):
        yield


def _flash_arguments(is_start_BT: Tensor, num_documents: int | None) -> dict[str, Any]:
    """Return where documents begin and end in the flattened rows, for variable-length kernels."""
    if num_documents is None:
        num_documents = int(is_start_BT.sum())
    numbers = torch.arange(1, num_documents + 2, device=is_start_BT.device)
    # Where the document of each number begins; none has the last number.
    boundaries = torch.searchsorted(is_start_BT.flatten().cumsum(0), numbers, out_int32=True)
    # The row length is not exact but long enough, and known without waiting for an accelerator.
    longest = is_start_BT.shape[1]
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
