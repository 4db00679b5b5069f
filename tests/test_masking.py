"""Masks: the shares of arXiv 1810.04805, no special tokens or padding, the same for a seed."""

import pytest
import torch
from masked_models import VOCAB_SIZE, word_tokenizer

from train.batches import collate
from train.loss import IGNORED_LABEL, NO_TARGET
from train.masking import Masking, generator_for

MASKING = Masking.of(word_tokenizer())
CLS, SEP = word_tokenizer().cls_token_id, word_tokenizer().sep_token_id


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [CLS, *torch.randint(5, VOCAB_SIZE, (n,), generator=generator).tolist(), SEP]
        for n in lengths
    ]
    return collate([{"input_ids": row} for row in rows])


def test_shares_of_masked_random_and_kept_tokens():
    batch = batch_of([500] * 200)
    hidden = MASKING.hide(batch, generator_for(0))
    is_target = hidden["labels"] >= 0
    assert is_target.float().mean() == pytest.approx(0.15 * 500 / 502, abs=0.003)
    assert torch.equal(hidden["labels"][is_target], batch["input_ids"][is_target])
    shown, true = hidden["input_ids"][is_target], batch["input_ids"][is_target]
    is_mask = shown == MASKING.mask_token_id
    assert is_mask.float().mean() == pytest.approx(0.8, abs=0.01)
    # A random token may be the true one.
    assert ((shown == true).float().mean()) == pytest.approx(0.1 + 0.1 / VOCAB_SIZE, abs=0.01)
    random_tokens = shown[~is_mask & (shown != true)]
    counts = torch.bincount(random_tokens, minlength=VOCAB_SIZE)
    assert counts.max() < 3 * counts[5:].float().mean()


def test_nothing_else_changes():
    batch = batch_of([3, 40, 7])
    before = {name: tensor.clone() for name, tensor in batch.items()}
    hidden = MASKING.hide(batch, generator_for(3))
    for name, tensor in batch.items():
        assert torch.equal(tensor, before[name])
    is_target = hidden["labels"] >= 0
    assert torch.equal(hidden["input_ids"][~is_target], batch["input_ids"][~is_target])
    is_padding = batch["labels"] == IGNORED_LABEL
    assert torch.equal(hidden["labels"] == IGNORED_LABEL, is_padding)
    assert (hidden["labels"][~is_padding & ~is_target] == NO_TARGET).all()
    is_special = (batch["input_ids"] == CLS) | (batch["input_ids"] == SEP)
    assert not (is_target & is_special).any()


def test_masks_do_not_depend_on_splitting_and_padding():
    lengths = [3, 40, 7, 12]
    together = MASKING.hide(batch_of(lengths), generator_for(1, 2))
    rows = batch_of(lengths)["input_ids"]
    generator = generator_for(1, 2)
    for i, length in enumerate(lengths):
        row = collate([{"input_ids": rows[i, : length + 2].tolist()}])
        alone = MASKING.hide(row, generator)
        for name in ("input_ids", "labels"):
            assert torch.equal(alone[name][0], together[name][i, : length + 2])


def test_masks_differ_from_step_to_step_and_repeat_with_the_seed():
    batch = batch_of([200])
    drawn = [
        MASKING.hide(batch, generator_for(*numbers))["labels"]
        for numbers in ((0, 1, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert all(not torch.equal(drawn[0], other) for other in drawn[2:])


def test_held_out_rows_have_the_same_masks_in_any_batch():
    whole = MASKING.hide_each(batch_of([9, 30, 4]), 0, 5)
    rows = batch_of([9, 30, 4])["input_ids"]
    second = collate([{"input_ids": rows[1].tolist()}])
    alone = MASKING.hide_each(second, 1, 5)
    assert torch.equal(alone["labels"][0], whole["labels"][1])
