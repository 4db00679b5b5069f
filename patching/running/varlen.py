"""Attention within documents, one document after another, without a mask.

With a mask, PyTorch computes every pair of positions of a row, also those that do not see each
other, and on GPUs cannot use its flash attention. That takes rows flattened into one sequence of
documents of any length. On other devices, and for what its kernels cannot do, each document is a
call of its own. transformers knows this function under the name VARLEN, next to `sdpa` and others.

Shapes: B rows, T positions, N = B T tokens, H heads, D size of a head; keys and values may have
fewer heads.
"""

from itertools import pairwise
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
    a document. Raises ValueError for a mask, for cached keys, and for what `is_plain` rejects.
    """
    if attention_mask is not None or key_BHTD.shape[2] != query_BHTD.shape[2]:
        raise ValueError(f"attn_implementation={VARLEN}: it takes documents, no mask and no cache")
    if not is_plain(others):
        raise ValueError(f"attn_implementation={VARLEN}: this model's attention has more to it")
    num_rows, _, length, _ = query_BHTD.shape
    if cu_seq_lens_q is None:
        ends = torch.arange(num_rows + 1, dtype=torch.int32, device=query_BHTD.device)
        cu_seq_lens_q, max_length_q = ends * length, length
    device, dtype = query_BHTD.device.type, query_BHTD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    states = [
        values.transpose(1, 2).flatten(0, 1).to(dtype)
        for values in (query_BHTD, key_BHTD, value_BHTD)
    ]
    before, after = (-1 if sliding_window is None else sliding_window - 1,) * 2
    if module.is_causal if is_causal is None else is_causal:
        after = 0
    settings = {"scale": scaling, "window_size": (before, after)}
    if has_kernels(*states):
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        output_NHD = varlen_attn(*states, *lengths, **settings, enable_gqa=True)
    else:
        output_NHD = one_by_one(*states, cu_seq_lens_q, **settings)
    return output_NHD.unflatten(0, (num_rows, length)), None


def is_plain(arguments: dict[str, Any]) -> bool:
    """Whether a layer asks for no dropout, soft cap, attention sinks or bias by position."""
    return not any(arguments.get(name) for name in ("dropout", "softcap")) and all(
        arguments.get(name) is None for name in ("s_aux", "position_bias")
    )


def has_kernels(query_NHD: Tensor, _key: Tensor, value_NHD: Tensor) -> bool:
    """Whether PyTorch's flash attention takes these states: on CUDA GPUs, in half precision."""
    size = query_NHD.shape[-1]
    return (
        query_NHD.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query_NHD.device) >= LEAST_CAPABILITY
        and query_NHD.dtype in (torch.bfloat16, torch.float16)
        and size == value_NHD.shape[-1] <= LARGEST_HEAD
        and size % 8 == 0
    )


@torch.compiler.disable  # the number of documents differs from batch to batch
def one_by_one(
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    ends: Tensor,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """Compute what `varlen_attn` does, with a call for each document. `window_size` is how many
    positions before and after its own a position sees, -1 for all.
    """
    before, after = window_size
    outputs = []
    for start, stop in pairwise(ends.tolist()):
        query, key, value = (
            values[start:stop].transpose(0, 1)[None] for values in (query_NHD, key_NHD, value_NHD)
        )
        mask_TT, num_positions = None, stop - start
        if 0 <= before < num_positions - 1:
            sees_TT = torch.ones(num_positions, num_positions, dtype=torch.bool, device=ends.device)
            mask_TT = sees_TT.triu(-before).tril(after)
        output = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_TT,
            is_causal=mask_TT is None and after == 0,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, flash_attention_mask)
