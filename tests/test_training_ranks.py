"""What a step trains on does not depend on the number of ranks, and ranks wait for each other."""

import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer
from datasets import Dataset
from torch.distributed import HashStore
from training_runs import rows, trainer_for

from train import ranks
from train.data import Share
from train.data_args import DataArguments
from train.local_batches import check_enough_rows, local_loader
from train.loss import IGNORED_LABEL
from train.masking import Masking
from train.ranks import first_rank_first
from train.run import load_rows
from train.training_args import DistillationArguments


def arguments(tmp_path, **flags) -> DistillationArguments:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | flags
    return DistillationArguments(save_directory=str(tmp_path), **settings)


def steps_of(
    dataset: Dataset, args: DistillationArguments, num_ranks: int
) -> list[list[list[int]]]:
    """Return the rows of each optimizer step of one pass, over all ranks."""
    loaders = [local_loader(dataset, args, Share(rank, num_ranks)) for rank in range(num_ranks)]
    for loader in loaders:
        loader.set_epoch(3)
    per_rank = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in per_rank}) == 1 == len({len(x) for x in loaders})
    size, steps = args.gradient_accumulation_steps, []
    for first in range(0, len(per_rank[0]), size):
        step = []
        for i in range(first, min(first + size, len(per_rank[0]))):
            for batches in per_rank:
                labels_BT = batches[i]["labels"]
                real = [row[row != IGNORED_LABEL].tolist() for row in labels_BT]
                step += [row for row in real if row]
        steps.append(step)
    return steps


@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length"])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(tmp_path, order):
    dataset = rows(29)
    flags = {"train_sampling_strategy": order}
    one = steps_of(dataset, arguments(tmp_path, gradient_accumulation_steps=6, **flags), 1)
    assert sorted(row for step in one for row in step) == sorted(dataset["input_ids"])
    for num_ranks in (2, 3, 6):
        args = arguments(tmp_path, gradient_accumulation_steps=6 // num_ranks, **flags)
        assert steps_of(dataset, args, num_ranks) == one


def test_masks_do_not_depend_on_ranks(tmp_path):
    masking = Masking(mask_token_id=4, special_ids=(), vocab_size=30)
    ids = torch.arange(5, 29).view(4, 6)
    batches = [{"input_ids": ids[i : i + 1], "labels": ids[i : i + 1]} for i in range(4)]
    one = masking.hide_step(batches, 0, 7, 1, Share())
    for rank in range(2):
        mine = masking.hide_step(batches[rank::2], 0, 7, 1, Share(rank, 2))
        for batch, expected in zip(mine, one[rank::2], strict=True):
            assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert not torch.equal(one[0]["input_ids"], ids[:1])


def test_text_smaller_than_a_step_needs_epochs(tmp_path):
    dataset = rows(7)
    found = "the text makes 7 rows of up to 32 tokens, a step takes 12"
    flags = {"gradient_accumulation_steps": 6}
    with pytest.raises(ValueError, match=f"{found}: lower --gradient_accumulation_steps, or give"):
        check_enough_rows(dataset, arguments(tmp_path, max_steps=3, **flags), 32)
    epochs = arguments(tmp_path, num_train_epochs=2, **flags)
    assert check_enough_rows(dataset, epochs, 32).startswith(found)
    assert check_enough_rows(dataset, arguments(tmp_path, max_steps=3), 32) is None


def test_other_ranks_wait_for_the_first_one_of_their_node(monkeypatch):
    store, order = HashStore(), []
    monkeypatch.setattr(ranks, "_get_default_store", lambda: store)

    def rank(local_process_index: int) -> None:
        args = SimpleNamespace(world_size=2, local_process_index=local_process_index)
        with first_rank_first(args, "tokenizing"):
            order.append(local_process_index)

    second = threading.Thread(target=rank, args=(1,))
    second.start()
    second.join(0.2)
    assert order == []
    rank(0)
    second.join(20)
    assert order == [0, 1]


def test_one_process_uses_one_gpu_and_says_how_to_use_all(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="one process uses one of 4 GPUs, start `torchrun .*=4"):
        args = arguments(tmp_path, bf16=False)
    assert args.n_gpu == 1
    assert args.train_batch_size == 2


def test_the_seed_of_the_text_is_its_own(tmp_path):
    assert arguments(tmp_path, seed=3).text_seed == 3
    assert arguments(tmp_path, seed=3, data_seed=0).text_seed == 0
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(40)))
    data_args = DataArguments(dataset=str(path), max_length=16)
    held_out = [
        load_rows(data_args, byte_tokenizer(), seed).held_out["input_ids"] for seed in (0, 1)
    ]
    assert held_out[0] != held_out[1]


@pytest.mark.slow
def test_a_resumed_trainer_skips_what_was_read(tmp_path):
    """In the middle of a pass whose last step is short."""
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 5, "max_steps": 6,
        "eval_strategy": "no", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9,
    }  # fmt: skip
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    for step in (2, 4, 5):
        resumed = trainer_for(tmp_path / f"{step}", **settings)
        resumed.train(str(tmp_path / f"checkpoints/checkpoint-{step}"))
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), (step, name)
