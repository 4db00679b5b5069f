"""A last checkpoint when the run is told to stop."""

import random
import signal

import numpy
import torch
from torch import Tensor
from transformers import TrainerCallback


class StopOnSigterm(TrainerCallback):
    """On SIGTERM to any rank, stop after the current micro-batch (on several GPUs the next one) and
    leave a checkpoint.

    An interrupted optimizer step is discarded: the checkpoint is that of the step before, with the
    random states of the interrupted step's beginning.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False
        self._previous = None

    def on_train_begin(self, args, state, control, **_) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        self._agreement = Agreement(args.device) if args.world_size > 1 else None

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

    def restore(self) -> None:
        """Give SIGTERM back its earlier meaning."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _stop(self, control) -> None:
        self.stopped = control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def _agreed(self) -> bool:
        """Whether any rank has received the signal."""
        if self._agreement is None:
            return self.received
        return self._agreement.any(self.received)


class Agreement:
    """Tells every rank at the same call that one of them has raised a flag.

    On CUDA the answer is that of the call before. It has arrived by then, so that nothing waits
    for the GPU to finish the micro-batch that was just started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def any(self, flag: bool) -> bool:
        flags = torch.full((), int(flag), device=self._device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        if self._device.type != "cuda":
            return bool(flags)
        before, copy = self._before, torch.empty_like(flags, device="cpu", pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        self._before = copy, torch.cuda.Event()
        self._before[1].record()
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


def random_states() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple) -> None:
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])
