"""Pseudo-perplexity of masked language models (Salazar et al., arXiv 1910.14659, section 2):

    PPPL = exp(-1/N sum over texts and their tokens of log P(token | its text, that token masked))

Every token is masked once, in a copy of its text. Copies of all texts are sorted by length and run
in batches, and the head runs at the masked positions only. Members of a family share the layers
that they have in common at the bottom.

Shapes: R copies in a batch, T positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from evaluate.family import SingleModel
from patching.architectures.lookup import max_positions
from patching.architectures.models import predicts_masked_tokens
from patching.running.chunks import log_normalizers
from patching.running.prefix_tree import PrefixTree

TOKENS_PER_BATCH = 2**14
CPU_TOKENS_PER_BATCH = 2**10
"""Fewer on a CPU, so that activations stay in its caches."""
METRIC = "pseudo_perplexity"


class MaskedText(NamedTuple):
    """A text as the model reads it."""

    input_ids: list[int]
    """Its tokens, with the tokenizer's special tokens around them."""
    positions: list[int]
    """Positions of the tokens that are masked one at a time: all except special tokens. Unknown
    words count."""
    num_left_out: int
    """Tokens cut off at its end because the model has no more positions."""


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


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[MaskedText]:
    """Texts as tokens, cut to what the model can read. A text without tokens has no positions.

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
        input_ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        positions = [i for i, token in enumerate(input_ids) if token not in special]
        encoded.append(MaskedText(input_ids, positions, max(0, len(tokens) - room)))
    return encoded


def batches_of(
    texts: Sequence[MaskedText], mask_token_id: int, padding_id: int, tokens_per_batch: int
) -> Iterator[Copies]:
    """All copies of all texts, longest first, in batches of at most `tokens_per_batch` tokens
    including padding, but at least one copy.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].input_ids))
    copies = [(i, position) for i in order for position in texts[i].positions]
    first = 0
    while first < len(copies):
        longest = len(texts[copies[first][0]].input_ids)
        chosen = copies[first : first + max(1, tokens_per_batch // longest)]
        first += len(chosen)
        rows = torch.tensor([i for i, _ in chosen])
        positions_R = torch.tensor([position for _, position in chosen])
        lengths_R = torch.tensor([len(texts[i].input_ids) for i, _ in chosen])
        different, row_of_copy_R = rows.unique(return_inverse=True)
        padded = [
            texts[i].input_ids + [padding_id] * (longest - len(texts[i].input_ids))
            for i in different.tolist()
        ]
        input_ids_RT = torch.tensor(padded)[row_of_copy_R]
        each_R = torch.arange(len(chosen))
        targets_R = input_ids_RT[each_R, positions_R]
        input_ids_RT[each_R, positions_R] = mask_token_id
        mask_RT = None
        if int(lengths_R.min()) < longest:
            mask_RT = (torch.arange(longest)[None] < lengths_R[:, None]).long()
        yield Copies(input_ids_RT, mask_RT, positions_R, targets_R, rows)


@torch.inference_mode()
def score_members(
    tree: PrefixTree | SingleModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[MaskedText],
    tokens_per_batch: int | None = None,
    show_progress: bool = True,
) -> dict[str, list[TextScore]]:
    """Each member's pseudo-log-likelihood of each text, 0 for a text without tokens.

    `tokens_per_batch` includes padding. By default it depends on the device.
    """
    device = tree.models[tree.names[0]].device
    if tokens_per_batch is None:
        tokens_per_batch = CPU_TOKENS_PER_BATCH if device.type == "cpu" else TOKENS_PER_BATCH
    num_tokens = [len(text.positions) for text in texts]
    sums = {name: torch.zeros(len(texts), dtype=torch.float64) for name in tree.names}
    batches = batches_of(
        texts, tokenizer.mask_token_id, tokenizer.pad_token_id or 0, tokens_per_batch
    )
    with tqdm(
        total=sum(num_tokens),
        desc="masked tokens",
        unit="token",
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
                sums[name].index_add_(0, copies.text_indices_R[chunk], log_p_R.double().cpu())
            progress.update(num_rows)
    return {
        name: [TextScore(*pair) for pair in zip(of_name.tolist(), num_tokens)]
        for name, of_name in sums.items()
    }


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
