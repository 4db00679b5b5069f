"""Pseudo-perplexity of masked language models (Salazar et al., arXiv 1910.14659, section 2):

    PPPL = exp(-1/N sum over texts and their tokens of log P(token | its text, that token masked))

and that of Kauf and Ivanova (arXiv 2305.10588), where the later tokens of the same word are masked
too. Without that, a model reads much of a long word off its other tokens.

Every token is masked once, in a copy of its text, and once more if its word goes on after it.
Copies of all texts are sorted by length and run in batches, and the head runs at the scored
positions only. Members of a family share the layers that they have in common at the bottom.

Shapes: R copies in a batch, T positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from evaluate.family import SeparateModels
from patching.architectures.lookup import max_positions
from patching.architectures.models import predicts_masked_tokens
from patching.running.chunks import log_normalizers
from patching.running.prefix_tree import PrefixTree

TOKENS_PER_BATCH = 2**14
CPU_TOKENS_PER_BATCH = 2**10
"""Fewer on a CPU, so that activations stay in its caches."""
METRIC = "pseudo_perplexity"
WITHIN_WORDS = "pseudo_perplexity_within_words"


class MaskedText(NamedTuple):
    """A text as the model reads it."""

    input_ids: list[int]
    """Its tokens, with the tokenizer's special tokens around them."""
    positions: list[int]
    """Positions of the tokens that are masked one at a time: all except special tokens. Unknown
    words count."""
    num_left_out: int
    """Tokens cut off at its end because the model has no more positions."""
    word_ends: Sequence[int] = ()
    """For each position, the one after the last token of its word. Empty if words do not matter."""


class TextScore(NamedTuple):
    """The pseudo-log-likelihood of a text."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    num_tokens: int


class Copies(NamedTuple):
    """Copies of texts, each with one token masked."""

    input_ids_RT: Tensor
    attention_mask_RT: Tensor | None
    """None if all copies have the same length."""
    positions_R: Tensor
    targets_R: Tensor
    text_indices_R: Tensor
    counts_R2: Tensor
    """1 where a copy counts: in the score with one token masked, and in that within words."""


def encode(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    with_words: bool = False,
) -> list[MaskedText]:
    """Texts as tokens, cut to what the model can read. A text without tokens has no positions.
    `with_words` needs a fast tokenizer, which knows the word of each token.

    Raises ValueError for a tokenizer without a mask token, and for a model that predicts the next
    token.
    """
    if not predicts_masked_tokens(config):
        raise ValueError(
            f"model_type={config.model_type}: pseudo-perplexity is for masked language models, "
            "but this model predicts the next token and has a perplexity"
        )
    if tokenizer.mask_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: its tokenizer has no mask token")
    longest = min(max_positions(config), tokenizer.model_max_length)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    room = longest - tokenizer.num_special_tokens_to_add()
    encoded = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        encoding = tokenizer(text, truncation=True, max_length=longest)
        input_ids = encoding["input_ids"]
        positions = [i for i, token in enumerate(input_ids) if token not in special]
        ends = word_ends(encoding.word_ids(), positions) if with_words else ()
        encoded.append(MaskedText(input_ids, positions, max(0, len(tokens) - room), ends))
    return encoded


def word_ends(word_ids: Sequence[int | None], positions: Sequence[int]) -> list[int]:
    """For each position, the one after the last token of its word. `word_ids` are the words of all
    tokens.
    """
    ends = []
    for position in positions:
        end = position + 1
        while end < len(word_ids) and word_ids[end] == word_ids[position] is not None:
            end += 1
        ends.append(end)
    return ends


def batches_of(
    texts: Sequence[MaskedText], mask_token_id: int, padding_id: int, tokens_per_batch: int
) -> Iterator[Copies]:
    """All copies of all texts, longest first, in batches of at most `tokens_per_batch` tokens
    including padding, but at least one copy.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].input_ids))
    copies = [copy for i in order for copy in _copies_of(i, texts[i])]
    first = 0
    while first < len(copies):
        longest = len(texts[copies[first][0]].input_ids)
        chosen = copies[first : first + max(1, tokens_per_batch // longest)]
        first += len(chosen)
        rows, positions_R, ends_R, *counts = map(torch.tensor, zip(*chosen))
        lengths_R = torch.tensor([len(texts[i].input_ids) for i in rows.tolist()])
        different, row_of_copy_R = rows.unique(return_inverse=True)
        padded = [
            texts[i].input_ids + [padding_id] * (longest - len(texts[i].input_ids))
            for i in different.tolist()
        ]
        input_ids_RT = torch.tensor(padded)[row_of_copy_R]
        each_R = torch.arange(len(chosen))
        targets_R = input_ids_RT[each_R, positions_R]
        places_T = torch.arange(longest)
        is_masked_RT = (places_T >= positions_R[:, None]) & (places_T < ends_R[:, None])
        input_ids_RT[is_masked_RT] = mask_token_id
        mask_RT = None
        if int(lengths_R.min()) < longest:
            mask_RT = (torch.arange(longest)[None] < lengths_R[:, None]).long()
        counts_R2 = torch.stack(counts, dim=-1).double()
        yield Copies(input_ids_RT, mask_RT, positions_R, targets_R, rows, counts_R2)


def _copies_of(i: int, text: MaskedText) -> Iterator[tuple[int, int, int, bool, bool]]:
    """For each copy of text i: i, the position whose token is scored, the one where masking ends,
    and in which of the two scores it counts.
    """
    for position, end in zip(text.positions, text.word_ends or [p + 1 for p in text.positions]):
        is_last = end == position + 1
        yield i, position, position + 1, True, is_last
        if not is_last:
            yield i, position, end, False, True


@torch.inference_mode()
def score_members(
    tree: PrefixTree | SeparateModels,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[MaskedText],
    tokens_per_batch: int | None = None,
    show_progress: bool = True,
) -> dict[str, list[TextScore]]:
    """Each member's pseudo-log-likelihood of each text, 0 for a text without tokens. Arguments are
    those of `both_scores`.
    """
    num_tokens = [len(text.positions) for text in texts]
    both = both_scores(tree, tokenizer, texts, tokens_per_batch, show_progress)
    return {
        name: [TextScore(score, count) for (score, _), count in zip(of_name, num_tokens)]
        for name, of_name in both.items()
    }


@torch.inference_mode()
def both_scores(
    tree: PrefixTree | SeparateModels,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[MaskedText],
    tokens_per_batch: int | None = None,
    show_progress: bool = True,
) -> dict[str, list[tuple[float, float]]]:
    """Each member's two pseudo-log-likelihoods of each text: with one token masked, and with the
    later tokens of its word masked too. Both are the same for texts without `word_ends`.

    `tokens_per_batch` includes padding. By default it depends on the device.
    """
    device = tree.models[tree.names[0]].device
    if tokens_per_batch is None:
        tokens_per_batch = CPU_TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_PER_BATCH
    sums = {name: torch.zeros(len(texts), 2, dtype=torch.float64) for name in tree.names}
    batches = batches_of(
        texts, tokenizer.mask_token_id, tokenizer.pad_token_id or 0, tokens_per_batch
    )
    with tqdm(
        total=sum(len([*_copies_of(i, text)]) for i, text in enumerate(texts)),
        desc="masked copies",
        unit="copy",
        leave=False,
        disable=not show_progress,
    ) as progress:
        for copies in batches:
            num_rows, row_length = copies.input_ids_RT.shape
            inputs = {"input_ids": copies.input_ids_RT.to(device)}
            if copies.attention_mask_RT is not None:
                inputs["attention_mask"] = copies.attention_mask_RT.to(device)
            positions_R = torch.arange(num_rows) * row_length + copies.positions_R
            targets_R1 = copies.targets_R.to(device)[:, None]
            for name, chunk, logits_RV in tree.logits(inputs, positions_R.to(device)):
                log_sum_R, _ = log_normalizers(logits_RV)
                log_p_R = logits_RV.gather(-1, targets_R1[chunk])[:, 0].float() - log_sum_R
                log_p_R2 = log_p_R.double().cpu()[:, None] * copies.counts_R2[chunk]
                sums[name].index_add_(0, copies.text_indices_R[chunk], log_p_R2)
            progress.update(num_rows)
    return {name: [*map(tuple, of_name.tolist())] for name, of_name in sums.items()}


def stderr_of_perplexity(scores: Sequence[tuple[float, int]]) -> float | str:
    """Standard error over texts of exp(mean loss per token), or `N/A` for a single text.

    `scores` are (log-likelihood, number of tokens) of each text. The mean is a ratio of two sums
    over texts, so its error is that of a ratio estimator (Cochran, Sampling Techniques, 3rd
    edition, 2.11), carried through exp to first order.
    """
    if len(scores) < 2:
        return "N/A"  # lm-eval's own way to say so
    num_tokens = sum(count for _, count in scores)
    loss = -sum(log_likelihood for log_likelihood, _ in scores) / num_tokens
    squares = sum((log_likelihood + loss * count) ** 2 for log_likelihood, count in scores)
    error = math.sqrt(squares * len(scores) / (len(scores) - 1)) / num_tokens
    return math.exp(loss) * error


def what_was_cut(texts: Sequence[MaskedText]) -> str | None:
    """A line that says how much was cut from texts that were too long. None if none was."""
    cut = [text.num_left_out for text in texts if text.num_left_out]
    if not cut:
        return None
    return (
        f"{len(cut)} of {len(texts)} texts are longer than the model can read: {sum(cut)} tokens "
        "at their ends are left out"
    )
