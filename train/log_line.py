"""What a line of the training log reports about the steps since the line before."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import TrainerState

from patching.running.peak_memory import peak_bytes
from train.loss import LossTerms

GIB = 2**30


class LogLine:
    """Sums up loss terms, positions, FLOPs and time from one line of the log to the next.

    `terms` are the loss terms to report, and `device` is where their sums are kept.
    """

    def __init__(self, terms: list[str], device: torch.device) -> None:
        self.terms, self.device = terms, device
        self.start(TrainerState())

    def start(self, state: TrainerState) -> None:
        """Begin a line at this state of the run."""
        self._term_sums = torch.zeros(len(self.terms), device=self.device)
        self._positions = torch.zeros((), dtype=torch.long, device=self.device)
        self._slots = torch.zeros_like(self._positions)
        self._step, self._flops = state.global_step, state.total_flos
        self._time = time.perf_counter()

    def add_terms(self, terms: LossTerms) -> None:
        """Add a micro-batch's shares of its step's means."""
        self._term_sums += torch.stack([getattr(terms, name) for name in self.terms])

    def add_positions(self, positions: Tensor, slots: Tensor) -> None:
        """Add a step's real positions over all ranks, and all its positions including padding."""
        self._positions += positions
        self._slots += slots

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the line's speed."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def values(
        self, state: TrainerState, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return the unweighted terms as means over the line's steps, the speed and the padding of
        all ranks, and the peak memory of this one.
        """
        num_steps = state.global_step - self._step
        terms = sum_over_ranks(self._term_sums).tolist()
        seconds = time.perf_counter() - self._time
        positions, slots = int(self._positions), int(self._slots)
        return {
            **{name: value / num_steps for name, value in zip(self.terms, terms)},
            "tokens_per_second": positions / seconds,
            "flops_per_second": (state.total_flos - self._flops) / seconds,
            "padding_share": 1 - positions / slots,
            "peak_memory_gib": peak_bytes() / GIB,
        }
