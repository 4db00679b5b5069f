"""transformers' Trainer with the distillation loss and prefetched steps.

The student's `forward` runs the teacher too and returns the loss (see train.distillation), so the
student is an ordinary model for everything that Trainer does with it, saving and resuming included.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from patching.architectures.models import predicts_masked_tokens
from patching.blocks import LayerMap
from patching.files.outputs import write_json
from train.batches import Batch
from train.chats.phase_log import LogEndOfText, phase_values
from train.chats.phases import Phases
from train.checkpoints.identity import FILE_NAME
from train.checkpoints.stop import StopOnSigterm
from train.distillation import install_distillation_forward
from train.divergence import check_metrics
from train.estimate import flops_per_token
from train.evaluation import eval_mode, held_out_means
from train.log_line import LogLine
from train.loss import LossTerms, StepCounts
from train.masking import Masking
from train.sharding import keep_gathered, parallelism, place_teacher, release
from train.speed import speed_up
from train.step_trainer import StepTrainer
from train.student import drop_second_names
from train.teacher_cache import TeacherCache
from train.training_args import DistillationArguments


class DistillationTrainer(StepTrainer):
    """Trains `student` in place; `teacher` is frozen and never saved."""

    # The loss is already divided by the counts of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        layer_map: LayerMap,
        args: DistillationArguments,
        masking: Masking | None = None,
        cache: TeacherCache | None = None,
        settings: dict[str, Any] | None = None,
        held_out_chats: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        """`masking` is for masked language models. With `cache`, `teacher` is None. `settings` are
        what identifies the run in its checkpoints. `held_out_chats` are evaluated besides the
        held-out text.
        """
        assert predicts_masked_tokens(student.config) == (masking is not None)
        for model in filter(None, (student, teacher)):
            speed_up(model, args)
            drop_second_names(model)
        args.use_liger_kernel = args.push_to_hub = False  # Trainer's own losses and uploads
        install_distillation_forward(student, teacher, layer_map, args.loss_weights)
        if kwargs.get("eval_dataset") is None:
            args.eval_strategy = IntervalStrategy.NO
        self._settings, self._held_out_chats = settings, held_out_chats
        self._flops = flops_per_token(student.config, teacher and teacher.config, args.loss_weights)
        self.log_line = LogLine.of_run(args, layer_map)
        self.stop_on_sigterm = StopOnSigterm()
        callbacks = [self.stop_on_sigterm]
        if isinstance(phases := kwargs["train_dataset"], Phases):
            callbacks.append(LogEndOfText(phases.num_text_steps))
        super().__init__(student, args, masking, cache, callbacks=callbacks, **kwargs)
        self.model_accepts_loss_kwargs = False  # otherwise Trainer counts targets its own way
        place_teacher(self.accelerator, teacher, args.compute_dtype)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # `speed_up` has compiled the layers, so accelerate must not compile the whole model.
        settings = {"dynamo_plugin": TorchDynamoPlugin("no")}
        if self.args.fsdp:
            settings |= parallelism(self.args.fsdp_replicas, self.args.world_size)
        return super()._build_accelerator_args(**kwargs) | settings

    # Loss and log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this micro-batch's share of the step's loss, times the number of ranks: data
        parallelism averages gradients over them.
        """
        keep_gathered(self.model.get_output_embeddings(), not self.accelerator.sync_gradients)
        terms: LossTerms = model(**inputs, counts=num_items_in_batch)
        self.log_line.add_terms(terms)
        loss = terms.loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        return sum(map(self._flops.of_batch, inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the unweighted terms and the speed to a line that reports a training loss."""
        if "loss" in logs:
            logs |= self.log_line.finish(self.state, self._sum_over_ranks, self.accelerator.gather)
            if isinstance(self.train_dataset, Phases):
                next_step = self._prefetcher.position_at(self.state.global_step)
                values = (self.train_dataset, self.state, logs["tokens_seen"], next_step)
                logs |= phase_values(*values)
        super().log(logs, start_time)

    # Held-out rows

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss and its terms over the held-out rows, cross entropy and KL always. Those
        over chats have `_chat` after the prefix if text is held out, too.
        """
        held_out = {metric_key_prefix: eval_dataset or self.eval_dataset}
        if eval_dataset is None and self._held_out_chats is not None:
            held_out[f"{metric_key_prefix}_chat"] = self._held_out_chats
        metrics = {}

        def forward(batch: Batch, counts: StepCounts) -> LossTerms:
            with self.compute_loss_context_manager():
                batch = self._prepare_inputs(self._prefetcher.complete(batch))
                return self.model_wrapped(**batch, counts=counts)

        with self.log_line.paused(), eval_mode(self.model_wrapped):
            for prefix, rows in held_out.items():
                means = held_out_means(
                    forward, rows, self.args, self._share, self._masking, self._sum_over_ranks
                )
                metrics |= {f"{prefix}_{name}": value for name, value in means.items()}
            release(self.accelerator.unwrap_model(self.model_wrapped).get_output_embeddings())
            check_metrics(self.state.global_step, metrics)
            self.log(metrics)
            state = (self.args, self.state, self.control, metrics)
            self.control = self.callback_handler.on_evaluate(*state)
        return metrics

    # Checkpoints

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        self._resume_from = resume_from_checkpoint
        # A stream resumes at its saved position; Trainer would read it again from the start.
        self.args.ignore_data_skip = not isinstance(self.train_dataset, Dataset)
        evaluates = self.args.eval_strategy != IntervalStrategy.NO
        self.args.eval_on_start &= evaluates and resume_from_checkpoint is None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.stop_on_sigterm.restore()

    def _init_training_state(self, *args):
        values = super()._init_training_state(*args)
        self.log_line.start(self.state)
        return values

    def _save_checkpoint(self, model, trial) -> None:
        with self.log_line.paused():
            self.log_line.count_tokens(self.state)
            super()._save_checkpoint(model, trial)

    def add_to_checkpoint(self, checkpoint: Path) -> None:
        self._prefetcher.save_position(checkpoint, self.state.global_step)
        if self.args.should_save and self._settings is not None:
            write_json(checkpoint / FILE_NAME, self._settings)
