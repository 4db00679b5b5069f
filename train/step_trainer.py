"""transformers' Trainer on steps that are fetched whole, one ahead."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from train.batches import (
    Batch,
    StepPrefetcher,
    StreamBatches,
    collate,
    count_positions,
    in_turns,
    to_device,
)
from train.chats.phases import Phases
from train.checkpoints.trainer import CheckpointedTrainer
from train.data import Share
from train.local_batches import local_loader
from train.log_line import LogLine
from train.loss import StepCounts
from train.masking import Masking
from train.teacher_cache import TeacherCache
from train.training_args import DistillationArguments


class StepTrainer(CheckpointedTrainer):
    """Gives each micro-batch the counts of its whole step, over all ranks.

    A step of chats has more micro-batches than Trainer expects, or fewer. So Trainer gets a step in
    as many turns as it expects, each with any number of micro-batches.
    """

    log_line: LogLine

    def __init__(
        self,
        student: PreTrainedModel,
        args: DistillationArguments,
        masking: Masking | None,
        cache: TeacherCache | None,
        **kwargs: Any,
    ) -> None:
        self._masking = masking
        self._share = Share(args.process_index, args.world_size)
        self._prefetcher = StepPrefetcher(self._share, args.device, cache)
        self._resume_from: str | None = None
        super().__init__(student, args, data_collator=collate, **kwargs)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, Dataset):
            return local_loader(self.train_dataset, self.args, self._share)
        num_batches = self.args.gradient_accumulation_steps * self._share.world_size
        size, share = self._train_batch_size, self._share
        stream = StreamBatches(self.train_dataset, size, num_batches, share)
        self._prefetcher.read(stream, self._resume_from)
        return stream

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the turns of the step, and its counts over all of them and all ranks."""
        step = self.state.global_step
        if step >= self.state.max_steps:  # resumed after the last step
            self.control.should_training_stop = True
            return [], None
        batches = self._prefetcher.batches(step, epoch_iterator, num_batches)
        if self._masking is not None:
            size = self.args.per_device_train_batch_size
            batches = self._masking.hide_step(batches, self.args.seed, step, size, self._share)
        totals = count_positions(batches, self._masking is not None, device)
        targets, compared, *others = self._sum_over_ranks(totals)
        self.log_line.add_positions(step, targets, *others)
        # A short step may have no masked token.
        counts = StepCounts(targets.clamp_min(1), compared.clamp_min(1))
        is_of_chats = isinstance(self.train_dataset, Phases)
        return in_turns(batches, num_batches if is_of_chats else len(batches)), counts

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return to_device(inputs, self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of one turn, whose micro-batches are computed one by one."""
        loss = torch.zeros((), device=self.args.device)
        for batch in inputs:
            loss += super().training_step(model, batch, num_items_in_batch)
        return loss
