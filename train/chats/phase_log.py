"""What the log of a run with chats says about its phases, and the plot's title."""

from typing import Any

from transformers import TrainerCallback, TrainerState

from train.chats.phases import Phases
from train.stream import Position

TEXT, CHATS = 1, 2
"""Numbers of the phases in the log, because trackers take only numbers."""


class LogEndOfText(TrainerCallback):
    """Ends a line of the log with the last step of text, so that each line is about one phase."""

    def __init__(self, num_text_steps: int) -> None:
        self._num_text_steps = num_text_steps

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self._num_text_steps:
            control.should_log = True


def phase_values(
    phases: Phases, state: TrainerState, tokens_seen: int, position: Position | None
) -> dict[str, float]:
    """Return the phase of a line of the log, the tokens of chats so far, and how many chats were
    left out. `position` is that of the next step, which only the first rank knows.
    """
    if state.global_step <= phases.num_text_steps:
        return {"phase": TEXT}
    before = (line for line in reversed(state.log_history) if line.get("phase") == TEXT)
    text_tokens = next(before, {"tokens_seen": 0})["tokens_seen"]
    values = {"phase": CHATS, "chat_tokens_seen": tokens_seen - text_tokens}
    chats = position and position["chats"]
    return values | ({"chats_left_out": sum(chats["refused"].values())} if chats else {})


def phase_lines(log: list[dict[str, Any]]) -> list[str]:
    """Return a line for each phase of a log, with its steps and tokens. Empty without chats."""
    lines, first_step, tokens_before = [], 1, 0
    for number, name in ((TEXT, "text"), (CHATS, "chats")):
        if of_phase := [line for line in log if line.get("phase") == number]:
            last = of_phase[-1]
            tokens = last["tokens_seen"] - tokens_before
            lines.append(f"{name}: steps {first_step}-{last['step']}, {tokens:,} tokens")
            first_step, tokens_before = last["step"] + 1, last["tokens_seen"]
    return lines


def chat_steps(log: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the steps after which chats began and ended, the same twice if there were none."""
    last_of_text, last = (
        max((line["step"] for line in log if line.get("phase") in phases), default=0)
        for phases in ((TEXT,), (TEXT, CHATS))
    )
    return last_of_text, last
