"""Attention within documents by the flash attention that PyTorch has, without a mask.

Its kernels take rows flattened into one sequence of documents of any length, and skip what lies
between documents. With a mask, PyTorch runs slower kernels on every pair of positions of a row.
transformers knows this function under the name VARLEN, next to `sdpa` and others.

Shapes: B rows, T positions, H heads, D size of a head; keys and values may have fewer heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

VARLEN = "varlen"
LARGEST_HEAD = 256
LEAST_CAPABILITY = (8, 0)
"""Of the GPU, for which the kernels are built."""


def varlen_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output (B, T, H, D), with the arguments of transformers.

    `cu_seq_lens_q` is where documents begin and end in the flattened rows. Without it, each row is
    a document. Raises ValueError for a mask, and for what `fits_varlen` rejects.
    """
    if attention_mask is not None:
        raise ValueError(f"attn_implementation={VARLEN}: it takes documents and no mask")
    if not fits_varlen(query_BHTD, value_BHTD, others):
        raise ValueError(f"attn_implementation={VARLEN}: this model's attention has more to it")
    num_rows, _, length, _ = query_BHTD.shape
    if cu_seq_lens_q is None:
        ends = torch.arange(num_rows + 1, dtype=torch.int32, device=query_BHTD.device)
        cu_seq_lens_q, max_length_q = ends * length, length
    device, dtype = query_BHTD.device.type, query_BHTD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    inputs = (query_BHTD, key_BHTD, value_BHTD)
    flat = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in inputs)
    before, after = (-1 if sliding_window is None else sliding_window - 1,) * 2
    if module.is_causal if is_causal is None else is_causal:
        after = 0
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    settings = {"scale": scaling, "window_size": (before, after), "enable_gqa": True}
    return varlen_attn(*flat, *lengths, **settings).unflatten(0, (num_rows, length)), None


def fits_varlen(query_BHTD: Tensor, value_BHTD: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether the kernels compute all that a layer asks for: heads of one size, in steps of 8 up to
    LARGEST_HEAD, and no dropout, soft cap, attention sinks or bias by position.
    """
    size = query_BHTD.shape[-1]
    has_more = any(arguments.get(name) for name in ("dropout", "softcap")) or any(
        arguments.get(name) is not None for name in ("s_aux", "position_bias")
    )
    fits = size == value_BHTD.shape[-1] <= LARGEST_HEAD and size % 8 == 0
    return fits and not has_more


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, flash_attention_mask)
