"""A whole family as one lm-eval model. Log-likelihoods of all members come from one pass over their
tree of layers, and so do the prompts of what they generate.

Requests are tokenized, sorted and batched once for all members.

Shapes: B rows, T positions, N selected positions, P scored tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval import utils
from lm_eval.api.instance import Instance
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from evaluate.answers import Answer
from evaluate.generation import GeneratingLM, Generator
from evaluate.ranks import Ranks
from evaluate.request_rows import Row, batch_of, rows_of, take_batch
from patching.architectures.lookup import architecture_of
from patching.running.chunks import CHUNK_LOGITS, log_normalizers
from patching.running.joint import JointModel
from patching.running.prefix_tree import PrefixTree, returning, whole_rows

AUTO_TOKENS = 2**14
"""Tokens in the first batch under `batch_size="auto"`, halved each time memory runs out."""


class SeparateModels:
    """Some models with the interface of a `PrefixTree`. Each runs as it is, so it may be of an
    architecture that patching does not support.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self.names, self.models = [*models], dict(models)
        self.joint_models = [JointModel.alone(name, model) for name, model in models.items()]

    @torch.no_grad()
    def logits(
        self, inputs: Mapping[str, Tensor], positions_N: Tensor
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """The models' logits at some positions of a batch, as `PrefixTree.logits` gives them."""
        row_length = inputs["input_ids"].shape[1]
        ids_N = inputs["input_ids"].flatten()[positions_N]
        for name, model in self.models.items():
            base = model.base_model
            output = base(**inputs, use_cache=False)
            step = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
            for chunk in whole_rows(len(positions_N), step, row_length):
                shape = (-1, min(row_length, chunk.stop - chunk.start))
                selected_BTD = output[0].flatten(0, 1)[positions_N[chunk]].unflatten(0, shape)
                # What follows the layers is the architecture's own, at these positions alone.
                with returning(base, replace(output, last_hidden_state=selected_BTD)):
                    yield name, chunk, model(ids_N[chunk].view(shape)).logits.flatten(0, 1)

    @torch.no_grad()
    def prefill(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Cache]]:
        """The logits after each row's last token and the cache, as `PrefixTree.prefill` does."""
        for name, model in self.models.items():
            cache = DynamicCache(config=model.config)
            keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
            returned = model(**inputs, past_key_values=cache, use_cache=True, **keep)
            yield name, returned.logits[:, -1], cache


class ContinuationScore(NamedTuple):
    """The score of one continuation."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


class FamilyLM(GeneratingLM):
    """The members of a tree as one lm-eval model, which answers for the active member.

    Log-likelihoods and greedy answers of all members are computed when the first of them is asked,
    and kept until `forget`. `batch_size` counts rows as long as the longest request; `auto` takes
    as many as fit, up to `max_batch_size`. `generation_batch_size` counts prompts, by default as
    many as fit. Softmaxes are in fp32. With several `ranks`, the first one's requests are dealt to
    all of them.
    """

    def __init__(
        self,
        tree: PrefixTree | SeparateModels,
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        generation_batch_size: int | None = None,
        generator: Generator | None = None,
        max_length: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        first, model = next(iter(tree.models.items()))
        self.tree = tree
        self._scores: dict[tuple[str, ...], dict[str, ContinuationScore]] = {}
        self._answers: dict[tuple[str, str], dict[str, Answer]] = {}
        self._given: dict[str, list[Answer]] = {}
        self.generator = generator
        self.generation_batch_size, self.most_rows = generation_batch_size, max_batch_size
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )
        self.ranks = ranks or Ranks()
        self.activate(first)

    def activate(self, name: str) -> None:
        """Answer for this member from now on."""
        self.name = name
        self._given.clear()
        self._model = self.tree.models[name]
        self._config = self._model.config

    def forget(self) -> None:
        """Drop what was computed so far."""
        self._scores.clear()
        self._answers.clear()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._share("score_continuations", requests)
        return [tuple(self._scores[request.args][self.name]) for request in requests]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        self._share("score_texts", requests)
        return [self._scores[request.args][self.name].log_likelihood for request in requests]

    def _share(self, method: str, requests: Sequence[Instance]) -> None:
        """Let the ranks compute all members' scores of the requests that have none yet."""
        missing = {r.args: r for r in requests if r.args not in self._scores}
        scores = self.ranks.share(self, method, list(missing.values())) if missing else []
        self._scores.update(zip(missing, scores))

    def score_continuations(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[dict[str, ContinuationScore]]:
        """Every member's score of each request, by its name."""
        # lm-eval tokenizes them and calls `_loglikelihood_tokens`.
        return super().loglikelihood(requests, disable_tqdm)

    def score_texts(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[dict[str, ContinuationScore]]:
        """Every member's score of each whole text, by its name."""
        windows = list(rolling_windows(self, requests))
        totals = [dict.fromkeys(self.tree.names, 0.0) for _ in requests]
        scored = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        for (i, _), scores in zip(windows, scored):
            for name, score in scores.items():
                totals[i][name] += score.log_likelihood
        return [
            {name: ContinuationScore(total, False) for name, total in by_name.items()}
            for by_name in totals
        ]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[dict[str, ContinuationScore]]:
        """Every member's score of each (anything, context, continuation), by its name."""
        rows = rows_of(requests, self.max_length, longest_to_share(self.config, self.max_length))
        scores: list[dict[str, ContinuationScore]] = [{} for _ in requests]
        longest = max((len(row) for row in rows), default=0)
        is_auto, section, num_done = self.batch_size == "auto", 0, 0
        budget = AUTO_TOKENS if is_auto else int(self.batch_size) * longest
        with tqdm(
            total=len(requests), desc="log-likelihoods", disable=disable_tqdm or self.rank != 0
        ) as progress:
            # Batches are taken from the end, longest rows first, so that too large a batch shows at
            # once. Rows that are not shared need no mask and get batches of their own.
            waiting = sorted(rows, key=lambda row: (row.is_shared, len(row)))
            while waiting:
                batch = take_batch(waiting, budget, self.most_rows if is_auto else None)
                try:
                    add_scores(self.tree, batch, scores)
                except Exception as error:
                    if not should_reduce_batch_size(error) or len(batch) == 1:
                        raise
                    waiting += batch[::-1]
                    budget //= 2
                    clear_device_cache(garbage_collection=True)
                    continue
                num_done += (num_new := sum(row.num_requests for row in batch))
                progress.update(num_new)
                if is_auto and num_done * self.batch_schedule // len(requests) > section:
                    section, budget = section + 1, 2 * budget  # as lm-eval's auto:N tries for more
        return scores


def rolling_windows(
    lm: FamilyLM, requests: Sequence[Instance]
) -> Iterator[tuple[int, tuple[None, list[int], list[int]]]]:
    """What to score of whole texts, in pieces that fit the model: the index of a request, and
    (nothing, context, continuation). Every token is scored once.

    A request's arguments are those of `tok_encode`: the string, and whether to add special tokens
    if that is not left to the tokenizer.
    """
    for i, request in enumerate(requests):
        rolling = utils.get_rolling_token_windows(
            token_list=lm.tok_encode(*request.args),
            prefix_token=lm.prefix_token_id,
            max_seq_len=lm.max_length,
            context_len=1,
        )
        for window in map(utils.make_disjoint_window, rolling):
            yield i, (None, *window)


def longest_to_share(config: PreTrainedConfig, max_length: int) -> int:
    """The most tokens that a context and a continuation may have together to share a row with
    others, 0 if rows cannot be shared.
    """
    if not takes_packed_rows(config) or config._attn_implementation not in ("sdpa", "eager"):
        return 0
    # The mask of a shared row has no sliding window, so nothing may be longer than that.
    return getattr(config, "sliding_window", None) or max_length


def takes_packed_rows(config: PreTrainedConfig) -> bool:
    """Whether a model obeys the mask and position ids of a shared row. False for an architecture
    that patching does not support.
    """
    try:
        return architecture_of(config).takes_packed_rows
    except ValueError:
        return False


def add_scores(
    tree: PrefixTree | SeparateModels,
    rows: Sequence[Row],
    scores: list[dict[str, ContinuationScore]],
) -> None:
    """Add every member's scores of the rows' requests."""
    model = tree.models[tree.names[0]]
    batch = batch_of(rows, model.device, model.dtype)
    requests, owners_P = batch.owners_P.unique(return_inverse=True)
    log_likelihoods = {name: torch.zeros(len(requests), dtype=torch.float64) for name in tree.names}
    num_misses = {name: torch.zeros(len(requests)) for name in tree.names}
    for name, chunk, logits_NV in tree.logits(batch.inputs, batch.positions_N):
        is_here_P = (batch.places_P >= chunk.start) & (batch.places_P < chunk.stop)
        places, tokens = batch.places_P[is_here_P] - chunk.start, batch.tokens_P[is_here_P]
        log_sum_N, greatest_N = log_normalizers(logits_NV)
        logits_P = logits_NV[places, tokens].float()
        log_p = logits_P - log_sum_N[places]
        is_miss = logits_P < greatest_N[places]
        hits = (~is_miss).nonzero()[:, 0]  # of equal logits the first one is the greedy choice
        is_miss[hits] = logits_NV[places[hits]].argmax(-1) != tokens[hits]
        owners = owners_P[is_here_P.cpu()]
        log_likelihoods[name].index_add_(0, owners, log_p.cpu().double())
        num_misses[name].index_add_(0, owners, is_miss.cpu().float())
    for name in tree.names:
        for request, log_likelihood, misses in zip(
            requests.tolist(), log_likelihoods[name].tolist(), num_misses[name].tolist()
        ):
            scores[request][name] = ContinuationScore(log_likelihood, not misses)
