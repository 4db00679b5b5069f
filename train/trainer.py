"""transformers' Trainer with the distillation loss.

The student's `forward` is replaced by one that runs the teacher and itself and returns the loss, so
that whatever wraps the student (autocast, DDP, FSDP, compilation) wraps both, while saving and
resuming still see an ordinary model.
"""

import types
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from patching.blocks import LayerMap
from patching.hidden_states import hidden_states_at
from train.data import collate
from train.losses import (
    IGNORED_LABEL,
    LossTerms,
    LossWeights,
    StepCounts,
    count,
    distillation_loss,
)
from train.student import cast_parameters
from train.training_args import DistillationArguments


class DistillationTrainer(Trainer):
    """Trains `student` in place; `teacher` is frozen and never saved."""

    # The loss is divided by the whole step's counts already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layer_map: LayerMap,
        args: DistillationArguments,
        **kwargs: Any,
    ) -> None:
        install_distillation_forward(student, teacher, layer_map, args.loss_weights)
        super().__init__(student, args, data_collator=collate, **kwargs)
        self.model_accepts_loss_kwargs = False  # or it would count targets its own way
        teacher.to(args.device)
        self._term_sums: dict[str, Tensor] = {}
        self._steps_at_last_log = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The step's micro-batches, and its counts over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count(batch["labels"]) for batch in batches]
        totals = torch.tensor([sum(map(int, column)) for column in zip(*counts)] or [0, 0])
        totals = self.accelerator.reduce(totals.to(device), "sum")
        return batches, StepCounts(targets=totals[0], positions=totals[1])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss; data parallelism averages it over ranks
        again.
        """
        terms: LossTerms = model(**inputs, counts=num_items_in_batch)
        for name in ("cross_entropy", "kl", "cosine"):
            self._term_sums[name] = self._term_sums.get(name, 0) + getattr(terms, name)
        loss = terms.loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the unweighted terms, as means over the steps since the last line, to a training
        line.
        """
        if "loss" in logs and self._term_sums:
            names = active_terms(self.args.loss_weights)
            sums = torch.stack([self._term_sums[name] for name in names])
            sums = self.accelerator.reduce(sums, "sum")
            steps = self.state.global_step - self._steps_at_last_log
            logs |= {name: value / steps for name, value in zip(names, sums.tolist())}
            self._term_sums, self._steps_at_last_log = {}, self.state.global_step
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Each active term and the loss over the held-out rows, as exact means over all of them.

        Rows are shared out among the ranks; a rank that runs out repeats a row without counting it,
        since sharded models need every rank at every forward pass.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.model_wrapped
        model.eval()
        device = self.args.device
        one = StepCounts(torch.ones((), device=device), torch.ones((), device=device))
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        batch_size = self.args.per_device_eval_batch_size
        for start in range(0, len(rows), batch_size * self.accelerator.num_processes):
            first = start + self.accelerator.process_index * batch_size
            indices = [i for i in range(first, first + batch_size) if i < len(rows)]
            batch = collate([rows[i] for i in indices] or [rows[0]])
            if not indices:
                batch["labels"].fill_(IGNORED_LABEL)
            counts = count(batch["labels"])
            with self.compute_loss_context_manager():
                terms = model(**self._prepare_inputs(batch), counts=one)
            values = (terms.cross_entropy, terms.kl, terms.cosine, *counts)
            sums += torch.tensor([float(value) for value in values], device=device)
        cross_entropy, kl, cosine, targets, positions = self.accelerator.reduce(
            sums, "sum"
        ).tolist()
        means = {
            "cross_entropy": cross_entropy / targets,
            "kl": kl / targets,
            "cosine": cosine / positions,
        }
        weights = self.args.loss_weights
        loss = (
            weights.cross_entropy * means["cross_entropy"]
            + weights.kl * weights.temperature**2 * means["kl"]
            + weights.cosine * means["cosine"]
        )
        metrics = {"loss": loss} | {name: means[name] for name in active_terms(weights)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def save_student(self, folder: Path, dtype: torch.dtype) -> None:
        """Cast the student and write it whole from the main process, as a checkpoint to load."""
        student = self.accelerator.unwrap_model(self.model_wrapped)
        cast_parameters(student, dtype)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            student.save_pretrained(folder, state_dict=state)


def active_terms(weights: LossWeights) -> list[str]:
    return [name for name in ("cross_entropy", "kl", "cosine") if getattr(weights, name)]


def install_distillation_forward(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: LayerMap, weights: LossWeights
) -> None:
    """Make `student(...)` return the distillation loss of a micro-batch, and freeze the teacher.

    With the cosine term alone no head is run, and an untied head of the student is frozen with it.
    """
    teacher.eval().requires_grad_(False)
    pairs = layer_map.alignment_pairs if weights.cosine else layer_map.alignment_pairs[-1:]
    student_indices, teacher_indices = zip(*pairs)
    if not weights.needs_logits and not student.config.tie_word_embeddings:
        student.get_output_embeddings().requires_grad_(False)

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        counts: StepCounts,
        attention_mask: Tensor | None = None,
    ) -> LossTerms:
        with torch.no_grad():
            teacher_states = hidden_states_at(teacher, teacher_indices, input_ids, attention_mask)
        student_states = hidden_states_at(self, student_indices, input_ids, attention_mask)
        return distillation_loss(
            student_states,
            teacher_states,
            self.get_output_embeddings(),
            teacher.get_output_embeddings(),
            labels,
            weights,
            counts,
        )

    student.forward = types.MethodType(forward, student)
