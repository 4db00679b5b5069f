"""Flags for training on chats, after the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from train.loss_weights import CHAT_COSINE_WEIGHT, COSINE_WEIGHT

if TYPE_CHECKING:
    from train.data_args import DataArguments
    from train.training_args import DistillationArguments


@dataclass
class ChatArguments:
    _argument_group_name = "chats"

    sft_dataset: str | None = field(
        default=None,
        metadata={
            "help": "chats to train on after the text, named like --dataset: a column `messages`, "
            "or `prompt` and `completion`, and `tools` if there are any. The teacher's chat "
            "template renders them, and only the assistant's tokens are learned"
        },
    )
    sft_config: str | None = field(
        default=None, metadata={"help": "configuration, if the chats are a hub dataset"}
    )
    sft_split: str = field(
        default="train", metadata={"help": "split, if the chats are a hub dataset"}
    )
    sft_share: float = field(
        default=0.5,
        metadata={
            "help": "share of the steps that train on chats, the last ones, under the same "
            "schedule; 1 for chats alone"
        },
    )
    sft_eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "held-out chats, named like --sft_dataset (default: hold out some chats of "
            "--sft_dataset)"
        },
    )
    sft_heldout_chats: int = field(
        default=64,
        metadata={
            "help": "number of chats to hold out: the first ones of --sft_eval_dataset, or else of "
            "--sft_dataset, at most a tenth of it; 0 for none"
        },
    )
    sft_all_positions: bool = field(
        default=False,
        metadata={
            "help": "compare hidden states at all positions of chats, not only at those of "
            "responses"
        },
    )
    sft_max_refused: float = field(
        default=0.1,
        metadata={
            "help": "largest share of the chats that may be left out because it cannot be told "
            "which of their tokens are responses"
        },
    )

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.sft_share <= 1:
            problems.append(f"sft_share={self.sft_share:g}: choose a share above 0, up to 1")
        if self.sft_heldout_chats < 0:
            problems.append(f"sft_heldout_chats={self.sft_heldout_chats}: choose 0 or more")
        if not 0 <= self.sft_max_refused <= 1:
            problems.append(f"sft_max_refused={self.sft_max_refused:g}: choose a share from 0 to 1")
        defaults = type(self).__dataclass_fields__
        given = [
            f"--{name}"
            for name, of_flag in defaults.items()
            if name != "sft_dataset" and getattr(self, name) != of_flag.default
        ]
        if given and self.sft_dataset is None:
            problems.append(f"{' and '.join(given)} only applies with --sft_dataset")
        if problems:
            raise ValueError("; ".join(problems))

    def num_text_steps(self, num_steps: int) -> int:
        """Return how many of a run's steps come before its chats."""
        return num_steps if self.sft_dataset is None else round(num_steps * (1 - self.sft_share))

    def settle(self, args: DistillationArguments, data_args: DataArguments) -> None:
        """Set the weight of the cosine term, in place, if no flag does. Without text there is none
        to measure orders on.

        Raises ValueError for a run that counts passes over the text: its phases count steps.
        """
        if args.cosine_loss_weight is None:
            has_chats = self.sft_dataset is not None
            args.cosine_loss_weight = CHAT_COSINE_WEIGHT if has_chats else COSINE_WEIGHT
        if self.num_text_steps(args.max_steps) == 0:
            data_args.measure_order = False
        if self.sft_dataset is not None and args.max_steps < 0:
            raise ValueError(
                "sft_dataset: text and chats share a number of steps, give --max_steps and not "
                "--num_train_epochs"
            )
