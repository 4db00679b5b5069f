"""Requests as rows of tokens, and rows as batches of tensors.

Requests with the same context share a row: it holds the context once, followed by several
continuations that do not see each other.

Shapes: B rows, T positions, N selected positions, P scored tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]
Owner = tuple[int, int]
"""The index of a request, and the last token of its continuation."""


@dataclass
class Row:
    """A context and its continuations, one after the other.

    Each continuation lacks its last token, which is predicted but never read. It comes with the
    requests it belongs to and their last tokens.
    """

    context: Tokens
    continuations: list[tuple[Tokens, list[Owner]]]

    def __len__(self) -> int:
        return len(self.context) + self.num_continuation_tokens

    @property
    def num_continuation_tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.continuations)

    @property
    def num_requests(self) -> int:
        return sum(len(owners) for _, owners in self.continuations)

    @property
    def is_shared(self) -> bool:
        """Whether some of its tokens must not see each other."""
        return sum(bool(tokens) for tokens, _ in self.continuations) > 1


def rows_of(
    requests: Sequence[tuple[Any, list[int], list[int]]], max_length: int, longest_to_share: int
) -> list[Row]:
    """Rows for requests (anything, context, continuation), cut from the left to `max_length`.

    Context and continuation share a row with others only if they have at most `longest_to_share`
    tokens together. Raises ValueError for a context without tokens, and for a continuation that is
    empty or longer than `max_length`.
    """
    by_context: dict[Tokens, dict[Tokens, list[Owner]]] = {}
    num_cut = 0
    for i, (_, context, continuation) in enumerate(requests):
        if not context:
            raise ValueError(
                "a context has no tokens: lm-eval moves white space at the end of a context to the "
                "continuation, so a context of white space alone cannot be scored"
            )
        if not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, but the model scores 1 to "
                f"{max_length} at once"
            )
        tokens = (*context, *continuation)[-(max_length + 1) :]
        num_cut += len(tokens) < len(context) + len(continuation)
        start = len(tokens) - len(continuation)
        continuations = by_context.setdefault(tokens[:start], {})
        continuations.setdefault(tokens[start:-1], []).append((i, tokens[-1]))
    if num_cut:
        logger.warning(
            f"{num_cut} of {len(requests)} requests are longer than the model's limit of "
            f"{max_length} tokens: their contexts are cut from the left"
        )
    return [
        row
        for context, continuations in by_context.items()
        for row in _share(context, continuations, longest_to_share)
    ]


def _share(context: Tokens, continuations: Mapping[Tokens, list[Owner]], longest: int) -> list[Row]:
    """Rows for the continuations of one context. A continuation joins another's row unless
    attention would then compare more pairs of tokens than with a row for each.
    """
    rows: list[Row] = []
    for tokens, owners in sorted(continuations.items(), key=lambda item: len(item[0])):
        if (
            rows
            and len(context) + len(tokens) <= longest
            and 2 * len(tokens) * rows[-1].num_continuation_tokens <= len(context) ** 2
        ):
            rows[-1].continuations.append((tokens, owners))
        else:
            rows.append(Row(context, [(tokens, owners)]))
    return rows


def take_batch(waiting: list[Row], budget: int, most_rows: int | None = None) -> list[Row]:
    """Remove the next batch from the end: rows that are all shared or all not, with at most
    `budget` tokens when padded and at most `most_rows`, but at least one row.
    """
    batch = [waiting.pop()]
    most = max(1, min(budget // len(batch[0]), most_rows or budget))
    while waiting and len(batch) < most and waiting[-1].is_shared == batch[0].is_shared:
        batch.append(waiting.pop())
    return batch


class Batch(NamedTuple):
    """Rows as tensors. Scored token p belongs to request `owners_P[p]` and is predicted at position
    `positions_N[places_P[p]]`, which counts through the rows of `input_ids`. All tensors but the
    owners are on the models' device.
    """

    inputs: dict[str, Tensor]
    positions_N: Tensor
    tokens_P: Tensor
    places_P: Tensor
    owners_P: Tensor


def batch_of(rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> Batch:
    """The rows, padded at their ends. If any is shared, the inputs include the attention mask and
    position ids with which each continuation sees only its context and itself.
    """
    row_length = max(len(row) for row in rows)
    ids_BT = torch.zeros(len(rows), row_length, dtype=torch.long)
    position_ids_BT = torch.zeros_like(ids_BT)
    continuation_BT = torch.full_like(ids_BT, -1)
    positions, scored = [], []
    for b, row in enumerate(rows):
        length = len(row.context)
        ids_BT[b, :length] = torch.tensor(row.context)
        position_ids_BT[b, :length] = torch.arange(length)
        continuation_BT[b, :length] = 0
        positions.append(b * row_length + length - 1)
        first_place, start = len(positions) - 1, length
        for number, (tokens, owners) in enumerate(row.continuations, start=1):
            stop = start + len(tokens)
            ids_BT[b, start:stop] = torch.tensor(tokens)
            position_ids_BT[b, start:stop] = torch.arange(length, length + len(tokens))
            continuation_BT[b, start:stop] = number
            places = (first_place, *range(len(positions), len(positions) + len(tokens)))
            positions += range(b * row_length + start, b * row_length + stop)
            for owner, last_token in owners:
                scored += [
                    (token, place, owner) for token, place in zip((*tokens, last_token), places)
                ]
            start = stop
    inputs = {"input_ids": ids_BT.to(device)}
    if any(row.is_shared for row in rows):
        keys_B1T, queries_BT1 = continuation_BT[:, None], continuation_BT[:, :, None]
        may_see_BTT = ((keys_B1T == 0) | (keys_B1T == queries_BT1)).tril()
        mask_BTT = torch.zeros(may_see_BTT.shape, dtype=dtype)
        mask_BTT.masked_fill_(~may_see_BTT, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask_BTT[:, None].to(device)
        inputs["position_ids"] = position_ids_BT.to(device)
    tokens_P, places_P, owners_P = torch.tensor(scored).unbind(1)
    return Batch(
        inputs,
        torch.tensor(positions, device=device),
        tokens_P.to(device),
        places_P.to(device),
        owners_P,
    )
