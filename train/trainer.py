"""transformers' Trainer with the distillation loss.

The student's `forward` is replaced by one that runs the teacher and itself and returns the loss, so
that whatever wraps the student (autocast, DDP, FSDP) wraps both, while saving and resuming still
see an ordinary model.
"""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from patching.architectures.models import auto_class, predicts_masked_tokens
from patching.blocks import LayerMap
from patching.files.outputs import write_json
from train.batches import StreamBatches, collate
from train.checkpoints import (
    INCOMPLETE,
    StopOnSigterm,
    publish_checkpoint,
    remove_old,
    stream_file_name,
)
from train.data import Share
from train.distillation import install_distillation_forward
from train.estimate import flops_per_token, peak_memory_bytes
from train.loss import (
    IGNORED_LABEL,
    LossTerms,
    StepCounts,
    active_terms,
    count,
)
from train.masking import Masking, generator_for
from train.sharding import compute_in, release, shard_teacher
from train.speed import speed_up
from train.student import drop_second_names
from train.training_args import DistillationArguments

GIB = 2**30


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
        masking: Masking | None = None,
        **kwargs: Any,
    ) -> None:
        """`masking` says how a masked language model's tokens are hidden; a causal one has none."""
        self._masking = masking
        for model in (student, teacher):
            speed_up(model, args)
            if masking is not None:
                drop_second_names(model)
        args.use_liger_kernel = False  # applied; Trainer would do it with Liger's own losses
        install_distillation_forward(student, teacher, layer_map, args.loss_weights)
        self._is_masked_model = predicts_masked_tokens(student.config)
        assert self._is_masked_model == (masking is not None)
        self._flops = flops_per_token(student.config, teacher.config, args.loss_weights)
        if kwargs.get("eval_dataset") is None:
            args.eval_strategy = IntervalStrategy.NO
        self.stop_on_sigterm = StopOnSigterm()
        super().__init__(
            student, args, data_collator=collate, callbacks=[self.stop_on_sigterm], **kwargs
        )
        self.model_accepts_loss_kwargs = False  # or it would count targets its own way
        if self.is_fsdp_enabled:
            if args.compute_dtype != torch.float32:
                compute_in(self.accelerator, args.compute_dtype)
            shard_teacher(self.accelerator, teacher)
        else:
            teacher.to(args.device)
        self._prefetch = ThreadPoolExecutor(1, thread_name_prefix="micro-batches")
        self._next_batches: tuple[Iterator | None, Future | None] = None, None
        self._stream: StreamBatches | None = None
        self._stream_states: dict[int, dict | None] = {}
        self._staging: Path | None = None
        self._resume_from: str | None = None
        self._start_log_line()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Without accelerate's compilation of the whole model: layers are compiled one by one."""
        args = super()._build_accelerator_args(**kwargs)
        return args | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # Data

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        self._stream = StreamBatches(self.train_dataset, self._train_batch_size)
        if self._resume_from is not None:
            state = json.loads((Path(self._resume_from) / self._stream_file_name).read_text())
            if state is not None:
                self._stream.load_state_dict(state)
        return self._stream

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The step's micro-batches, and its counts over all of them and all ranks.

        While a step computes, a thread fetches (for a stream: tokenises) those of the next one.
        """
        if self.state.global_step >= self.state.max_steps:  # resumed behind the last step
            self.control.should_training_stop = True
            return [], None
        iterator, future = self._next_batches
        if iterator is not epoch_iterator:
            self._stream_state = None if self._stream is None else self._stream.state
            future = self._prefetch.submit(self._fetch, epoch_iterator, num_batches)
        batches, state = future.result()
        self._next_batches = (
            epoch_iterator,
            self._prefetch.submit(self._fetch, epoch_iterator, num_batches),
        )
        step = self.state.global_step
        if self._masking is not None:
            generator = generator_for(self.args.seed, step, self.args.process_index)
            batches = [self._masking.hide(batch, generator) for batch in batches]
        self._stream_states = {step: self._stream_state, step + 1: state}
        self._stream_state = state

        totals = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batches:
            slots = torch.tensor(batch["labels"].numel())
            counts = count(batch["labels"], self._is_masked_model)
            totals += torch.stack([*counts, slots.to(batch["labels"].device)]).to(device)
        targets, positions, slots = self.accelerator.reduce(totals, "sum")
        self._positions_and_slots += torch.stack((positions, slots))
        # A step of few tokens may have none masked.
        return batches, StepCounts(targets=targets.clamp_min(1), positions=positions)

    def _fetch(self, epoch_iterator: Iterator, num_batches: int) -> tuple[list, dict | None]:
        batches = super().get_batch_samples(epoch_iterator, num_batches, self.args.device)[0]
        return batches, None if self._stream is None else self._stream.state

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss; data parallelism averages it over ranks
        again.
        """
        terms: LossTerms = model(**inputs, counts=num_items_in_batch)
        for name in ("cross_entropy", "kl", "cosine"):
            self._term_sums[name] = self._term_sums.get(name, 0) + getattr(terms, name)
        loss = terms.loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        batch_size, num_positions = inputs["input_ids"].shape
        return self._flops.at(num_positions) * batch_size * num_positions

    # Log

    def _start_log_line(self) -> None:
        self._term_sums: dict[str, Tensor] = {}
        self._positions_and_slots = torch.zeros(2, dtype=torch.long, device=self.args.device)
        self._step_of_last_line = self.state.global_step
        self._flops_at_last_line = self.state.total_flos
        self._time_of_last_line = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training line the unweighted terms, as means over the steps since the last line,
        and how fast they went; over all ranks but for the memory, which is this rank's.
        """
        if "loss" in logs and self._term_sums:
            names = active_terms(self.args.loss_weights)
            sums = torch.stack([self._term_sums[name] for name in names])
            sums = self.accelerator.reduce(sums, "sum")
            steps = self.state.global_step - self._step_of_last_line
            seconds = time.perf_counter() - self._time_of_last_line
            positions, slots = self._positions_and_slots.tolist()
            logs |= {name: value / steps for name, value in zip(names, sums.tolist())}
            logs["tokens_per_second"] = positions / seconds
            logs["flops_per_second"] = (self.state.total_flos - self._flops_at_last_line) / seconds
            logs["padding_share"] = 1 - positions / slots
            logs["peak_memory_gib"] = peak_memory_bytes() / GIB
            self._start_log_line()
        super().log(logs, start_time)

    # Held-out rows

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss and its terms over the held-out rows, as exact means over all of them; cross
        entropy and KL also where training has them off.

        Rows are shared out among the ranks; a rank that runs out repeats a row without counting it,
        since sharded models need every rank at every forward pass.
        """
        start = time.perf_counter()
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        device = self.args.device
        one = StepCounts(*torch.ones(2, dtype=torch.long, device=device))
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        batch_size = self.args.per_device_eval_batch_size
        for first_row in range(0, len(rows), batch_size * self.accelerator.num_processes):
            first = first_row + self.accelerator.process_index * batch_size
            indices = [i for i in range(first, first + batch_size) if i < len(rows)]
            batch = collate([rows[i] for i in indices] or [rows[0]])
            if self._masking is not None:
                batch = self._masking.hide_each(batch, self.args.seed, first)
            if not indices:
                batch["labels"].fill_(IGNORED_LABEL)
            counts = count(batch["labels"], self._is_masked_model)
            with self.compute_loss_context_manager():
                terms = model(**self._prepare_inputs(batch), counts=one)
            values = (terms.cross_entropy, terms.kl, terms.cosine, *counts)
            sums += torch.stack([value.to(device, torch.float64) for value in values])
        model.train(was_training)
        release(self.accelerator.unwrap_model(model).get_output_embeddings())
        cross_entropy, kl, cosine, targets, positions = self.accelerator.reduce(
            sums, "sum"
        ).tolist()
        means = {
            "cross_entropy": cross_entropy / max(targets, 1),
            "kl": kl / max(targets, 1),
            "cosine": cosine / positions,
        }
        weights = self.args.loss_weights
        loss = (
            weights.cross_entropy * means["cross_entropy"]
            + weights.kl * weights.temperature**2 * means["kl"]
            + weights.cosine * means["cosine"]
        )
        names = active_terms(weights.for_evaluation())
        metrics = {"loss": loss} | {name: means[name] for name in names}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._time_of_last_line += time.perf_counter() - start
        return metrics

    # Checkpoints

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any):
        """Train, from a checkpoint's weights, optimiser, random states and place in the data."""
        self._resume_from = resume_from_checkpoint
        # A stream goes on from its own state; Trainer would read it again from the start.
        self.args.ignore_data_skip = isinstance(self.train_dataset, IterableDataset)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _init_training_state(self, *args):
        values = super()._init_training_state(*args)
        self._start_log_line()
        return values

    def _get_output_dir(self, trial) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Let Trainer write a checkpoint beside its place, and move it there when all is written.

        Ranks must see one file system, as Trainer's own checkpoints of sharded models need too.
        """
        start = time.perf_counter()
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staging = output_dir / INCOMPLETE
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        super()._save_checkpoint(model, trial)
        self._staging = None
        if self._stream is not None:
            # Resumed behind the last step, nothing was fetched: the place is still the loaded one.
            state = self._stream_states.get(self.state.global_step, self._stream.state)
            write_json(staging / name / self._stream_file_name, state)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint is not None:
                best = output_dir / Path(self.state.best_model_checkpoint).name
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            publish_checkpoint(name, output_dir)
            remove_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._time_of_last_line += time.perf_counter() - start

    @property
    def _stream_file_name(self) -> str:
        return stream_file_name(Share(self.args.process_index, self.args.world_size))

    def save_student(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the whole student from the main process, as a checkpoint to load."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return
        trained = self.accelerator.unwrap_model(self.model_wrapped)
        with torch.device("meta"):
            student = auto_class(trained.config).from_config(trained.config, dtype=dtype)
        if trained.can_generate():
            student.generation_config = trained.generation_config
        state = {
            name.replace("_checkpoint_wrapped_module.", ""): tensor.to(dtype)
            for name, tensor in state.items()
        }
        for name, second in (student._tied_weights_keys or {}).items():
            if name in state and second not in state:  # what `drop_second_names` left out
                state[second] = state[name].clone()
        student.load_state_dict(state, assign=True)
        student.tie_weights()
        student.save_pretrained(folder)
