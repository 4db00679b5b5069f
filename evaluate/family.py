"""A whole family as one lm-eval model: log-likelihoods of all members in one pass over their tree
of layers, generation member by member.

Requests are tokenised, sorted and batched once for all members. Requests that share a context run
it once: a row then holds the context and several continuations, none of which sees another.

Shapes: B rows, T positions, N selected positions, P scored tokens, V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluate.devices import share_out
from patching.architectures.lookup import architecture_of
from patching.recipe import Recipe
from patching.running.prefix_tree import PrefixTree

log = logging.getLogger(__name__)

AUTO_TOKENS = 2**14
"""Tokens of a batch to begin with under `batch_size="auto"`, halved as often as memory runs out."""


class ContinuationScore(NamedTuple):
    """Of one continuation."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""


class FamilyLM(HFLM):
    """The members of `recipes`, by name, as one model of the harness.

    `activate` chooses the member that speaks. Log-likelihoods of all members are computed when the
    first of them is asked and kept until `forget`. `batch_size` counts rows as long as a request's
    longest; shorter ones share the room. Softmaxes are taken in fp32.

    Under torchrun, pass an `accelerator`: the harness then shares out the requests among its ranks.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        *,
        teacher: PreTrainedModel | None = None,
        student: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = 1,
        max_length: int | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.tree = PrefixTree(recipes, teacher=teacher, student=student)
        self._scores: dict[tuple[str, ...], dict[str, ContinuationScore]] = {}
        self._detected_batch_size: int | None = None
        super().__init__(
            pretrained=self.tree.models[next(iter(recipes))],
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )
        share_out(self, accelerator)
        self.activate(next(iter(recipes)))

    def activate(self, name: str) -> None:
        """Speak for one member from here on."""
        self.name = name
        self._model = self.tree.models[name]
        self._config = self._model.config

    def forget(self) -> None:
        """Drop the log-likelihoods computed so far."""
        self._scores.clear()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        missing = self._not_scored(requests)
        if missing:
            # The harness tokenises and comes back to `_loglikelihood_tokens`.
            scores = super().loglikelihood(missing, disable_tqdm)
            self._scores.update(zip([request.args for request in missing], scores))
        return [tuple(self._scores[request.args][self.name]) for request in requests]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        missing = self._not_scored(requests)
        windows, owners = [], []
        for request in missing:
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(request.args)
        totals = {request.args: dict.fromkeys(self.tree.names, 0.0) for request in missing}
        for args, scores in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            for name, score in scores.items():
                totals[args][name] += score.log_likelihood
        for args, by_name in totals.items():
            self._scores[args] = {
                name: ContinuationScore(total, False) for name, total in by_name.items()
            }
        return [self._scores[request.args][self.name].log_likelihood for request in requests]

    def _not_scored(self, requests: Sequence[Instance]) -> list[Instance]:
        return list(
            {
                request.args: request for request in requests if request.args not in self._scores
            }.values()
        )

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """The harness's, once for all members."""
        if self._detected_batch_size is None:
            self._detected_batch_size = super()._detect_batch_size(requests, pos)
        return self._detected_batch_size

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[dict[str, ContinuationScore]]:
        """Every member's score of each (anything, context, continuation), by its name."""
        rows = self._rows(requests)
        scores: list[dict[str, ContinuationScore]] = [{} for _ in requests]
        longest = max((len(row) for row in rows), default=0)
        budget = AUTO_TOKENS if self.batch_size == "auto" else int(self.batch_size) * longest
        with tqdm(
            total=len(requests), desc="log-likelihoods", disable=disable_tqdm or self.rank != 0
        ) as progress:
            # From the end, longest first: what does not fit shows at once. Rows that are not shared
            # apart: they need no mask.
            waiting = sorted(rows, key=lambda row: (row.is_shared, len(row)))
            while waiting:
                batch = _take(waiting, budget)
                try:
                    self._score(batch, scores)
                except Exception as error:
                    if not should_reduce_batch_size(error) or len(batch) == 1:
                        raise
                    waiting += batch[::-1]
                    budget //= 2
                    clear_device_cache(garbage_collection=True)
                    continue
                progress.update(sum(row.num_requests for row in batch))
        return scores

    def _rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list["Row"]:
        """The requests as rows to run, each cut from the left to what the model reads."""
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[int, int]]]] = {}
        num_cut = 0
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, and the model scores "
                    f"1-{self.max_length} at once"
                )
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            num_cut += len(tokens) < len(context) + len(continuation)
            start = len(tokens) - len(continuation)
            continuations = by_context.setdefault(tokens[:start], {})
            continuations.setdefault(tokens[start:-1], []).append((i, tokens[-1]))
        if num_cut:
            log.warning(
                f"{num_cut} of {len(requests)} requests are longer than the {self.max_length} "
                "tokens the model reads: their contexts are cut from the left"
            )
        longest_to_share = self._longest_to_share
        return [
            row
            for context, continuations in by_context.items()
            for row in _share(context, continuations, longest_to_share)
        ]

    @property
    def _longest_to_share(self) -> int:
        """How long context and continuation may be together to share a row with others; 0 where
        none may.

        The mask of a shared row knows no sliding window, so nothing may be longer than that.
        """
        config = self.config
        if not architecture_of(config).takes_packed_rows or config._attn_implementation not in (
            "sdpa",
            "eager",
        ):
            return 0
        return getattr(config, "sliding_window", None) or self.max_length

    def _score(self, rows: Sequence["Row"], scores: list[dict[str, ContinuationScore]]) -> None:
        """Add every member's scores of the rows' requests."""
        batch = batch_of(rows, self.device, self.model.dtype)
        requests, owners_P = batch.owners_P.unique(return_inverse=True)
        log_likelihoods = {
            name: torch.zeros(len(requests), dtype=torch.float64) for name in self.tree.names
        }
        num_misses = {name: torch.zeros(len(requests)) for name in self.tree.names}
        for name, chunk, logits_NV in self.tree.logits(batch.inputs, batch.positions_N):
            is_here_P = (batch.places_P >= chunk.start) & (batch.places_P < chunk.stop)
            places, tokens = batch.places_P[is_here_P] - chunk.start, batch.tokens_P[is_here_P]
            logits_NV = logits_NV.float()
            log_p = logits_NV[places, tokens] - logits_NV.logsumexp(-1)[places]
            is_miss = logits_NV.argmax(-1)[places] != tokens
            owners = owners_P[is_here_P.cpu()]
            log_likelihoods[name].index_add_(0, owners, log_p.cpu().double())
            num_misses[name].index_add_(0, owners, is_miss.cpu().float())
        for name in self.tree.names:
            for request, log_likelihood, misses in zip(
                requests.tolist(), log_likelihoods[name].tolist(), num_misses[name].tolist()
            ):
                scores[request][name] = ContinuationScore(log_likelihood, not misses)


@dataclass
class Row:
    """A context and the beginnings of its continuations, one behind the other.

    Each is given without its last token, which is predicted and never read, together with the
    requests it belongs to and their last tokens.
    """

    context: tuple[int, ...]
    continuations: list[tuple[tuple[int, ...], list[tuple[int, int]]]]

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
        """Whether there are tokens that must not see each other."""
        return sum(bool(tokens) for tokens, _ in self.continuations) > 1


def _share(
    context: tuple[int, ...],
    continuations: Mapping[tuple[int, ...], list[tuple[int, int]]],
    longest: int,
) -> list[Row]:
    """Rows for the continuations of one context: one joins another's row unless attention then has
    more pairs of tokens to look at than in a row of its own.
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


def _take(waiting: list[Row], budget: int) -> list[Row]:
    """Remove the next batch from the end: rows of a kind, at most `budget` tokens when padded."""
    batch = [waiting.pop()]
    most = max(1, budget // len(batch[0]))
    while waiting and len(batch) < most and waiting[-1].is_shared == batch[0].is_shared:
        batch.append(waiting.pop())
    return batch


class Batch(NamedTuple):
    """Rows as tensors. Scored token p belongs to request `owners_P[p]` and is predicted at
    position `positions_N[places_P[p]]`, counted through the rows of `input_ids`. All but the owners
    lie on the models' device.
    """

    inputs: dict[str, Tensor]
    positions_N: Tensor
    tokens_P: Tensor
    places_P: Tensor
    owners_P: Tensor


def batch_of(rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> Batch:
    """The rows padded at their ends; where one is shared, with the mask and the position ids that
    let each continuation see its context and itself only.
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
