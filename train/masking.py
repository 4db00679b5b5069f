"""Masked language modelling: which tokens of a row are to be predicted, and what stands in their
place (Devlin et al., arXiv 1810.04805, section 3.1).

Masks are drawn anew each time a row is trained on. What is drawn depends on the generator and the
rows' lengths alone, not on how rows are padded or split into micro-batches.

Shapes: B rows, T positions.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from train.loss import IGNORED_LABEL, NO_TARGET

SHARE_OF_TARGETS = 0.15
SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1
"""Of the targets: those the mask token stands for, and those another token stands for; the rest
stay.
"""


class Masking(NamedTuple):
    """What a tokenizer says about masks."""

    mask_token_id: int
    special_ids: tuple[int, ...]
    """Tokens that are never targets, such as [CLS] and [SEP]."""
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Masking":
        """Raises ValueError for a tokenizer without a mask token."""
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: a masked language model learns from masked tokens, and "
                "its tokenizer has no mask token; set mask_token in its tokenizer_config.json"
            )
        return cls(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer))

    def hide(
        self,
        batch: dict[str, Any],
        generator: torch.Generator,
        share_of_targets: float = SHARE_OF_TARGETS,
    ) -> dict[str, Any]:
        """A batch with some of its tokens hidden, and labels for those alone.

        In the batch labels are the tokens, IGNORED_LABEL at padding; in the result they are
        NO_TARGET at real positions that are not to be predicted.
        """
        input_ids_BT, labels_BT = batch["input_ids"].clone(), batch["labels"].clone()
        is_real_BT = labels_BT != IGNORED_LABEL
        # Two numbers a real position, row by row, so that padding and splitting change no draw.
        uniform_N2 = torch.rand(int(is_real_BT.sum()), 2, generator=generator)
        draws_BT = torch.ones(labels_BT.shape, device=labels_BT.device)
        draws_BT[is_real_BT] = uniform_N2[:, 0].to(labels_BT.device)
        others_BT = torch.zeros_like(labels_BT)
        others_BT[is_real_BT] = (uniform_N2[:, 1] * self.vocab_size).long().to(labels_BT.device)
        special = torch.tensor(self.special_ids, device=labels_BT.device)
        is_target_BT = is_real_BT & ~torch.isin(input_ids_BT, special)
        is_target_BT &= draws_BT < share_of_targets
        place_BT = draws_BT / share_of_targets
        input_ids_BT[is_target_BT & (place_BT < SHARE_MASKED)] = self.mask_token_id
        is_random_BT = is_target_BT & (place_BT >= SHARE_MASKED)
        is_random_BT &= place_BT < SHARE_MASKED + SHARE_RANDOM
        input_ids_BT[is_random_BT] = others_BT[is_random_BT]
        labels_BT[is_real_BT & ~is_target_BT] = NO_TARGET
        return batch | {"input_ids": input_ids_BT, "labels": labels_BT}

    def hide_each(self, batch: dict[str, Any], seed: int, first_row: int) -> dict[str, Any]:
        """The same for rows to measure on, numbered from `first_row`: each row's masks are always
        the same ones, whatever batch it lies in.
        """
        rows = [
            self.hide({name: batch[name][i : i + 1] for name in batch}, generator_for(seed, row))
            for i, row in enumerate(range(first_row, first_row + len(batch["labels"])))
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in batch}


def generator_for(*numbers: int) -> torch.Generator:
    """A generator that depends on all of the numbers: seed, step, rank."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
