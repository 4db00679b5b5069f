"""Masked language modeling: which tokens of a row are to be predicted, and what replaces them in
the input (Devlin et al., arXiv 1810.04805, section 3.1).

New masks are drawn each time a row is trained on. They depend only on the generator and the rows'
lengths, not on how rows are padded or split into micro-batches.

Shapes: B rows, T positions.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from train.data import Share
from train.loss import IGNORED_LABEL, NO_TARGET

SHARE_OF_TARGETS = 0.15
SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1
"""Shares of the targets replaced by the mask token and by a random token. The rest stay."""


class Masking(NamedTuple):
    """How a tokenizer's tokens are hidden."""

    mask_token_id: int
    special_ids: tuple[int, ...]
    """Tokens that are never targets, such as [CLS] and [SEP]."""
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Masking":
        """Read the ids from a tokenizer. Raises ValueError if it has no mask token."""
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: this masked language model needs a mask token and its "
                "tokenizer has none; set mask_token in its tokenizer_config.json"
            )
        return cls(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer))

    def hide(
        self,
        batch: dict[str, Any],
        generator: torch.Generator,
        share_of_targets: float = SHARE_OF_TARGETS,
    ) -> dict[str, Any]:
        """Return a copy of a batch with some tokens hidden and with labels only for those.

        The batch's labels are IGNORED_LABEL at padding. In the result they are the hidden tokens,
        and NO_TARGET at real positions that are not to be predicted.
        """
        input_ids_BT, labels_BT = batch["input_ids"].clone(), batch["labels"]
        is_real_BT = labels_BT != IGNORED_LABEL
        # Two numbers per real position, row by row, so that padding and splitting change no draw.
        uniform_N2 = torch.rand(int(is_real_BT.sum()), 2, generator=generator)
        draws_BT = torch.ones(labels_BT.shape, device=labels_BT.device)
        draws_BT[is_real_BT] = uniform_N2[:, 0].to(labels_BT.device)
        others_BT = torch.zeros_like(labels_BT)
        others_BT[is_real_BT] = (uniform_N2[:, 1] * self.vocab_size).long().to(labels_BT.device)
        special = torch.tensor(self.special_ids, device=labels_BT.device)
        is_target_BT = is_real_BT & ~torch.isin(input_ids_BT, special)
        is_target_BT &= draws_BT < share_of_targets
        hidden_BT = torch.where(is_target_BT, input_ids_BT, NO_TARGET)
        place_BT = draws_BT / share_of_targets
        input_ids_BT[is_target_BT & (place_BT < SHARE_MASKED)] = self.mask_token_id
        is_random_BT = is_target_BT & (place_BT >= SHARE_MASKED)
        is_random_BT &= place_BT < SHARE_MASKED + SHARE_RANDOM
        input_ids_BT[is_random_BT] = others_BT[is_random_BT]
        labels_BT = torch.where(is_real_BT, hidden_BT, IGNORED_LABEL)
        return batch | {"input_ids": input_ids_BT, "labels": labels_BT}

    def hide_step(
        self, batches: list[dict[str, Any]], seed: int, step: int, batch_size: int, share: Share
    ) -> list[dict[str, Any]]:
        """Hide tokens in one rank's micro-batches of an optimizer step. A row's masks depend on its
        place among the rows that all ranks take in the step.
        """
        return [
            self.hide_each(batch, (i * share.world_size + share.rank) * batch_size, seed, step)
            for i, batch in enumerate(batches)
        ]

    def hide_each(self, batch: dict[str, Any], first_row: int, *numbers: int) -> dict[str, Any]:
        """Hide tokens in rows that are numbered from `first_row`. A row always gets the same masks
        for the same `numbers`, such as a seed, whatever batch it is in.
        """
        rows = [
            self.hide(
                {name: batch[name][i : i + 1] for name in batch}, generator_for(*numbers, row)
            )
            for i, row in enumerate(range(first_row, first_row + len(batch["labels"])))
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in batch}


def generator_for(*numbers: int) -> torch.Generator:
    """Return a generator seeded by all of the numbers, such as seed, step and row."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
