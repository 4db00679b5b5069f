"""Checkpoints that are complete or absent, and a last one when the run is told to stop.

A checkpoint is written in `.incomplete` next to the others and is renamed to `checkpoint-N` once
every rank has finished. A folder with that name is therefore always complete, whenever the run is
killed. All ranks must see one file system, as Trainer's checkpoints of sharded models require too.
"""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerState
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from train.data import Share
from train.training_args import DistillationArguments

INCOMPLETE = ".incomplete"
LAST = ("last", "true")
"""Values of `--resume_from_checkpoint` that ask for the newest checkpoint."""


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> str | None:
    """Return the folder to resume from, or None to start from the beginning. `last` also starts
    from the beginning if there is no checkpoint yet.

    Raises ValueError for a folder that is not a checkpoint.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    if resume_from_checkpoint.lower() in LAST:
        return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume_from_checkpoint}: no checkpoint there, name a folder "
            f"checkpoint-N in {output_dir}, or `last`"
        )
    return resume_from_checkpoint


def stream_file_name(share: Share) -> str:
    """The name of a checkpoint's file with a rank's position in its share of a stream."""
    return f"stream_{share.rank}_of_{share.world_size}.json"


def check_resumable(checkpoint: str, share: Share, is_stream: bool, is_sharded: bool) -> None:
    """Raise ValueError unless this run can resume from the checkpoint: it must read its data the
    same way, a stream on the same number of ranks, and shard its models or not as before.
    """
    folder = Path(checkpoint)
    problems = []
    if any(folder.glob(f"{FSDP_MODEL_NAME}*")) != is_sharded:
        was = "was not sharded" if is_sharded else "was sharded"
        problems.append(f"its run {was}, use the same --fsdp_config and ranks")
    states = {path.name for path in folder.glob("stream_*_of_*.json")}
    if is_stream and not states:
        problems.append("its run did not read a stream, use the same --dataset and --streaming")
    elif is_stream and stream_file_name(share) not in states:
        problems.append(
            f"it has stream positions for {len(states)} ranks and this run has "
            f"{share.world_size}, start {len(states)}"
        )
    elif states and not is_stream:
        problems.append("its run read a stream, use the same --dataset and --streaming")
    if problems:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint}: {'; '.join(problems)}, or start over in "
            "another --output_dir"
        )


@contextmanager
def staged_checkpoint(
    args: DistillationArguments, state: TrainerState, accelerator: Accelerator
) -> Iterator[Path]:
    """Yield the folder to write this step's checkpoint into, the same one on every rank. It is
    renamed after the block, and old checkpoints are removed.
    """
    output_dir, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    staging = output_dir / INCOMPLETE
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    yield staging / name
    accelerator.wait_for_everyone()
    if args.should_save:
        if state.best_model_checkpoint is not None:  # Trainer has recorded its path in `staging`
            best = output_dir / Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(best)
            state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        publish_checkpoint(name, output_dir)
        remove_old(output_dir, args.save_total_limit, state.best_model_checkpoint)
    accelerator.wait_for_everyone()


def publish_checkpoint(name: str, output_dir: Path) -> None:
    """Move a finished checkpoint out of `.incomplete`, replacing an earlier one of that name."""
    staging = output_dir / INCOMPLETE
    if (output_dir / name).exists():
        os.replace(output_dir / name, staging / f"{name}.replaced")
    os.replace(staging / name, output_dir / name)
    shutil.rmtree(staging)


def remove_old(output_dir: Path, save_total_limit: int | None, best: str | None) -> None:
    """Remove all checkpoints but the newest `save_total_limit` and the best one."""
    if not save_total_limit or save_total_limit < 0:
        return
    for checkpoint in sort_checkpoints(str(output_dir))[:-save_total_limit]:
        if best is None or Path(checkpoint).name != Path(best).name:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = output_dir / INCOMPLETE
            os.replace(checkpoint, doomed)
            shutil.rmtree(doomed)


class StopOnSigterm(TrainerCallback):
    """On SIGTERM to any rank, stop after the current micro-batch and leave a checkpoint.

    An interrupted optimizer step is discarded: the checkpoint is that of the step before, with the
    random states of the interrupted step's beginning.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False

    def on_train_begin(self, args, state, control, **_) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        # Ranks agree on the CPU, so that no accelerator has to synchronize.
        self._group = torch.distributed.new_group(backend="gloo") if args.world_size > 1 else None

    def _receive(self, *_) -> None:
        self.received = True

    def on_step_begin(self, args, state, control, **_) -> None:
        self._random_states = random_states()

    def on_substep_end(self, args, state, control, **_) -> None:
        if self._agreed():
            set_random_states(self._random_states)
            self._stop(control)

    def on_step_end(self, args, state, control, **_) -> None:
        if self._agreed():
            self._stop(control)

    def on_train_end(self, args, state, control, **_) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _stop(self, control) -> None:
        self.stopped = control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def _agreed(self) -> bool:
        """Whether any rank has received the signal."""
        if self._group is None:
            return self.received
        received = torch.tensor(int(self.received))
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, self._group)
        return bool(received)


def random_states() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple) -> None:
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])
