"""What a line of the training log reports about the steps since the line before."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import TrainerState

from patching.blocks import LayerMap
from patching.running.peak_memory import peak_bytes
from train.hardware_peak import peak_flops_per_second
from train.loss import LossTerms
from train.training_args import DistillationArguments

GIB = 2**30


class LogLine:
    """Sums up loss terms, positions, FLOPs and time from one line of the log to the next.

    `terms` are the loss terms to report, `num_pairs` is the number of aligned hidden states, and
    `device` is where their sums are kept. `peak_flops` is that of all ranks, per second.
    """

    def __init__(
        self,
        terms: list[str],
        num_pairs: int,
        device: torch.device,
        peak_flops: Callable[[], float],
    ) -> None:
        self.terms, self.num_pairs, self.device = terms, num_pairs, device
        self._peak_flops = peak_flops
        self.peak_memory_gib: list[float] = []
        """Of each rank, at the last line."""
        self.start(TrainerState())

    @classmethod
    def of_run(cls, args: DistillationArguments, layer_map: LayerMap) -> "LogLine":
        """Return the line of a run with these flags."""
        weights = args.loss_weights
        num_pairs = len(layer_map.alignment_pairs) if weights.cosine else 0

        def peak_flops() -> float:
            return peak_flops_per_second(args.device, args.compute_dtype) * args.world_size

        return cls(weights.active_terms, num_pairs, args.device, peak_flops)

    def start(self, state: TrainerState) -> None:
        """Begin a line at this state of the run."""
        self._term_sums = torch.zeros(len(self.terms), device=self.device)
        self._cosine_sums = torch.zeros(self.num_pairs, device=self.device)
        self._positions = torch.zeros((), dtype=torch.long, device=self.device)
        self._targets, self._slots = self._positions.clone(), self._positions.clone()
        self._counted, self._begun = 0, None
        self._step, self._flops = state.global_step, state.total_flos
        self._time = time.perf_counter()

    def add_terms(self, terms: LossTerms) -> None:
        """Add a micro-batch's shares of its step's means."""
        self._term_sums += torch.stack([getattr(terms, name) for name in self.terms])
        self._cosine_sums[: len(terms.cosine_by_state)] += terms.cosine_by_state

    def add_positions(self, step: int, targets: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Add a step's target and real positions over all ranks, and all its positions including
        padding. They count once the step is finished.
        """
        self._finish(step)
        self._begun = (step, targets, positions, slots)

    def _finish(self, step: int) -> None:
        if self._begun is not None and self._begun[0] < step:
            self._targets += self._begun[1]
            self._positions += self._begun[2]
            self._slots += self._begun[3]
            self._begun = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the line's speed."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def count_tokens(self, state: TrainerState) -> None:
        """Add the line's real tokens that are not counted yet to those that the state records."""
        self._finish(state.global_step)
        positions = int(self._positions)
        state.num_input_tokens_seen += positions - self._counted
        self._counted = positions

    def finish(
        self,
        state: TrainerState,
        sum_over_ranks: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], Tensor],
    ) -> dict[str, float]:
        """Return the unweighted terms as means over the line's steps, the speed, the padding and
        the peak memory of all ranks, the tokens since the first step, the loss tokens of a step,
        and the time that is left.
        Begin the next line.
        """
        num_steps = state.global_step - self._step
        sums = sum_over_ranks(torch.cat([self._term_sums, self._cosine_sums]))
        means = (sums / num_steps).tolist()
        terms, cosines = means[: len(self.terms)], means[len(self.terms) :]
        seconds = time.perf_counter() - self._time
        self.count_tokens(state)
        positions, slots = int(self._positions), int(self._slots)
        flops_per_second = (state.total_flos - self._flops) / seconds
        memory = gather(torch.tensor([peak_bytes()], device=self.device)).tolist()
        self.peak_memory_gib = [num_bytes / GIB for num_bytes in memory]
        values = {
            **dict(zip(self.terms, terms)),
            **({f"cosine_{j}": value for j, value in enumerate(cosines)} if any(cosines) else {}),
            "tokens_seen": state.num_input_tokens_seen,
            "loss_tokens_per_step": int(self._targets) / num_steps,
            "tokens_per_second": positions / seconds,
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / self._peak_flops(),
            "eta_seconds": round((state.max_steps - state.global_step) * seconds / num_steps),
            "padding_share": 1 - positions / slots,
            "peak_memory_gib": max(self.peak_memory_gib),
            "least_peak_memory_gib": min(self.peak_memory_gib),
        }
        self.start(state)
        return values
