"""transformers' Trainer with atomic checkpoints, of which one is always known to be good."""

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from train.checkpoints.atomic import (
    best_checkpoint,
    newest_checkpoint,
    remove_old,
    set_aside,
    staged_checkpoint,
)
from train.divergence import Diverged, check_step, check_weights
from train.sharding import release
from train.student import save_student


class CheckpointedTrainer(Trainer):
    """Writes checkpoints whole or not at all, and stops at the first step that is not finite.

    A checkpoint is good once the step after it was finite. Older ones are only removed then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoint_folder = self.args.output_dir
        self._unproven: Path | None = None
        """The checkpoint whose weights no step has used yet."""
        self._loaded_step: int | None = None
        self._step_loss = torch.zeros((), device=self.args.device)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._unproven = resumed
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except Diverged as error:
            if self.state.global_step == 0:
                raise Diverged(
                    f"{error}; no step had been taken, so check the weights of the teacher"
                ) from None
            good = newest_checkpoint(self.args.output_dir, besides=self._unproven)
            known = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
            if self._unproven not in (None, resumed):
                known += f", {set_aside(self._unproven, self.args.should_save)} led to this step"
            raise Diverged(f"{error}; {known}. Try a lower --learning_rate") from None
        self._checkpoint_is_good()
        return output

    def _init_training_state(self, max_steps: int, *others: Any) -> tuple[int, int]:
        """Start, or go on with the state of a checkpoint and what this run's flags say of when to
        log, evaluate and save, and of which checkpoint is the best.
        """
        values = super()._init_training_state(max_steps, *others)
        self.state.compute_steps(self.args, max_steps)
        if (metric := self.args.metric_for_best_model) is not None:
            best = best_checkpoint(self.args.output_dir, self.state.log_history, metric)
            names = ("best_metric", "best_global_step", "best_model_checkpoint")
            for name, value in zip(names, best or (None, None, None)):
                setattr(self.state, name, value)
        return values

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss += loss
        return loss

    @property
    def student_step(self) -> int:
        """The step whose weights the student has."""
        return self.state.global_step if self._loaded_step is None else self._loaded_step

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loaded_step = int(self.state.best_model_checkpoint.rpartition("-")[2])

    def _determine_best_metric(self, metrics, trial) -> bool:
        # Only weights that are saved can be loaded at the end.
        is_lost = self.args.save_strategy != SaveStrategy.BEST and not self.control.should_save
        return not is_lost and super()._determine_best_metric(metrics, trial)

    def _get_output_dir(self, trial) -> str:
        return str(self._checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        with staged_checkpoint(self.args, self.state, self.accelerator) as checkpoint:
            self._checkpoint_folder = checkpoint.parent
            release(self.model.get_output_embeddings())  # an interrupted step leaves it gathered
            super()._save_checkpoint(model, trial)
            self._checkpoint_folder = self.args.output_dir
            self.add_to_checkpoint(checkpoint)
        self._unproven = Path(self.args.output_dir, checkpoint.name)

    def add_to_checkpoint(self, checkpoint: Path) -> None:
        """Write more files into a checkpoint. Every rank calls this."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
            follow_schedule(self.lr_scheduler, self.args.learning_rate)

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer calls this once per step, after the last backward pass and before the optimizer.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        check_step(
            self.state.global_step + 1,
            self._step_loss,
            grad_norm,
            self.accelerator.scaler is not None,
            lambda values: self.accelerator.reduce(values, "sum"),
        )
        self._step_loss.zero_()
        self._checkpoint_is_good()
        return grad_norm

    def _checkpoint_is_good(self) -> None:
        if self._unproven is not None and self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_old(Path(self.args.output_dir), self.args.save_total_limit, best)
        self._unproven = None

    def save_student(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the whole student from the main process."""
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            check_weights(self.state.global_step, state_dict)
            student = self.accelerator.unwrap_model(self.model_wrapped)
            save_student(student, state_dict, folder, dtype)


def follow_schedule(scheduler: LambdaLR, learning_rate: float) -> None:
    """Continue a loaded schedule with the peak `learning_rate`, and with this run's number of
    steps. The states of optimizer and schedule hold those of the run before.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [learning_rate] * len(groups)
    for group, factor in zip(groups, scheduler.lr_lambdas):
        group["initial_lr"] = learning_rate
        group["lr"] = learning_rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]
