"""How well an engine's predictions agree with those of the same member in transformers 5.

Positions where our two likeliest tokens are almost equally likely are counted apart, because any
rounding may swap them. Greedy text is compared up to the first of them.

Shapes: R rows, T positions, V vocabulary, P prompts, N new tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEAR_TIE = 1e-3
"""Two logits closer than this are a near-tie."""
LEAST_AGREEMENT = 0.999
ROWS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one program computes for a member."""

    top1_RT: np.ndarray
    """The likeliest token after each position."""
    greedy_PN: np.ndarray
    """The likeliest continuation of each prompt."""
    logits_RTV: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Reference(Predictions):
    """Our predictions, with the distance between the two largest logits of each step."""

    gaps_RT: np.ndarray
    greedy_gaps_PN: np.ndarray


class Agreement(NamedTuple):
    positions: int
    near_ties: int
    top1: float
    """Share of the positions without a near-tie at which the likeliest token is the same."""
    kl: float | None
    """Mean KL divergence from our distribution to the engine's, in nats. None without logits."""
    greedy_tokens: int
    """Greedily chosen tokens before a near-tie, over all prompts."""
    greedy_differences: int
    """Prompts whose text differs before the first near-tie."""

    @property
    def is_enough(self) -> bool:
        return self.top1 >= LEAST_AGREEMENT and self.greedy_differences == 0


def agreement(ours: Reference, theirs: Predictions) -> Agreement:
    clear_RT = ours.gaps_RT >= NEAR_TIE
    same_RT = ours.top1_RT == theirs.top1_RT
    lengths = [before_near_tie(gaps_N) for gaps_N in ours.greedy_gaps_PN]
    differences = sum(
        not np.array_equal(our_N[:length], their_N[:length])
        for our_N, their_N, length in zip(ours.greedy_PN, theirs.greedy_PN, lengths)
    )
    return Agreement(
        positions=int(clear_RT.sum()),
        near_ties=int((~clear_RT).sum()),
        top1=float(same_RT[clear_RT].mean()),
        kl=None if theirs.logits_RTV is None else mean_kl(ours.logits_RTV, theirs.logits_RTV),
        greedy_tokens=sum(lengths),
        greedy_differences=differences,
    )


def before_near_tie(gaps_N: np.ndarray) -> int:
    """Return the number of tokens before the first near-tie, all of them if there is none."""
    near_ties = np.flatnonzero(gaps_N < NEAR_TIE)
    return int(near_ties[0]) if len(near_ties) else len(gaps_N)


def mean_kl(ours_RTV: np.ndarray, theirs_RTV: np.ndarray) -> float:
    """Return KL(ours || theirs), the mean over positions, in nats and computed in float64."""
    total = 0.0
    for start in range(0, len(ours_RTV), ROWS_AT_ONCE):
        ours = _log_softmax(ours_RTV[start : start + ROWS_AT_ONCE])
        theirs = _log_softmax(theirs_RTV[start : start + ROWS_AT_ONCE])
        total += float((np.exp(ours) * (ours - theirs)).sum())
    return total / (ours_RTV.shape[0] * ours_RTV.shape[1])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def top_two_gap(logits: np.ndarray) -> np.ndarray:
    """Return the distance between the two largest logits along the last dimension."""
    second, first = np.moveaxis(np.partition(logits, -2, axis=-1)[..., -2:], -1, 0)
    return first - second
