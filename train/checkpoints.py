"""Checkpoints that are there whole or not at all, and a last one when the run is told to stop.

A checkpoint is written in `.incomplete` beside the others and takes its name `checkpoint-N` when
every rank has finished, so that a name means a whole checkpoint whenever the run is killed.
"""

import os
import random
import shutil
import signal
from pathlib import Path

import numpy
import torch
from transformers import TrainerCallback
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from train.data import Share

INCOMPLETE = ".incomplete"
LAST = ("last", "true")
"""What `--resume_from_checkpoint` takes in place of a folder."""


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> str | None:
    """The folder to resume from; None to begin at the start, as `last` does where there is none.

    Raises ValueError for a folder that holds no checkpoint.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    if resume_from_checkpoint.lower() in LAST:
        return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume_from_checkpoint}: no checkpoint there, name a folder "
            f"checkpoint-N of {output_dir}, or `last`"
        )
    return resume_from_checkpoint


def stream_file_name(share: Share) -> str:
    """The file of a checkpoint that says where a rank was in its share of a stream."""
    return f"stream_{share.rank}_of_{share.world_size}.json"


def check_resumable(checkpoint: str, share: Share, is_stream: bool, is_sharded: bool) -> None:
    """Raise ValueError unless this run can go on from the checkpoint: its text is read the same
    way, a stream by as many ranks, and its models are sharded as they were.
    """
    folder = Path(checkpoint)
    problems = []
    if any(folder.glob(f"{FSDP_MODEL_NAME}*")) != is_sharded:
        was = "was not sharded" if is_sharded else "was sharded"
        problems.append(f"its run {was}, give --fsdp_config and ranks as it had them")
    states = {path.name for path in folder.glob("stream_*_of_*.json")}
    if is_stream and not states:
        problems.append("its run did not read a stream, give --dataset and --streaming as it had")
    elif is_stream and stream_file_name(share) not in states:
        problems.append(
            f"it knows the places of {len(states)} ranks in the stream and this run has "
            f"{share.world_size}, start {len(states)}"
        )
    elif states and not is_stream:
        problems.append("its run read a stream, give --dataset and --streaming as it had")
    if problems:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint}: {'; '.join(problems)}, or begin anew in "
            "another --output_dir"
        )


def publish_checkpoint(name: str, output_dir: Path) -> None:
    """Move the finished checkpoint out of `.incomplete`, in the place of an earlier one of that
    name.
    """
    staging = output_dir / INCOMPLETE
    if (output_dir / name).exists():
        os.replace(output_dir / name, staging / f"{name}.replaced")
    os.replace(staging / name, output_dir / name)
    shutil.rmtree(staging)


def remove_old(output_dir: Path, save_total_limit: int | None, best: str | None) -> None:
    """Keep the newest `save_total_limit` checkpoints, and the best one."""
    if not save_total_limit or save_total_limit < 0:
        return
    for checkpoint in sort_checkpoints(str(output_dir))[:-save_total_limit]:
        if best is None or Path(checkpoint).name != Path(best).name:
            # Renamed first: what is left when deletion is cut short must not look whole.
            doomed = output_dir / INCOMPLETE
            os.replace(checkpoint, doomed)
            shutil.rmtree(doomed)


class StopOnSigterm(TrainerCallback):
    """On SIGTERM to any rank, stop behind the current micro-batch and leave a checkpoint.

    An optimiser step that is cut short counts for nothing: the checkpoint is of the step before,
    and random states are put back to the step's beginning.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False

    def on_train_begin(self, args, state, control, **_) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        # Ranks agree on the CPU, so that no accelerator waits for it.
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
