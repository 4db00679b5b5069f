"""Flags for the teacher and for the layers its student keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patching.blocks import LayerMap, default_kept_layers
from patching.cli.units import parse_count, parse_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PAPER_LAYERS = {"llama": (2, 2, 1)}
"""The paper's first_layers_to_keep, alternate_every_n_layers and last_layers_to_keep, by
model_type.
"""
PAPER_LAYERS_OTHERWISE = (1, 2, 2)
"""The same for every other model_type."""


@dataclass
class ModelArguments:
    _argument_group_name = "the teacher and its layers"

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "the teacher's branch, tag or commit (default: main)"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run modeling code that comes with the teacher"}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "folder of train.cache_teacher: train on the predictions in it, without the "
            "teacher in memory. Needs --use_cosine_loss False"
        },
    )
    teacher_fp8: bool = field(
        default=False,
        metadata={
            "help": "run the layers of an unsharded teacher in FP8, on GPUs that have it: faster, "
            "and each product a few percent off"
        },
    )
    alternate_every_n_layers: int | None = field(
        default=None, metadata={"help": "keep every n-th teacher layer (default: every 2nd)"}
    )
    first_layers_to_keep: int | None = field(
        default=None,
        metadata={"help": "keep all of the first layers (default: 2 for a llama, else 1)"},
    )
    last_layers_to_keep: int | None = field(
        default=None,
        metadata={"help": "keep all of the last layers (default: 1 for a llama, else 2)"},
    )
    kept_layers: str | None = field(
        default=None,
        metadata={
            "help": "keep these teacher layers instead, such as 0,1,3-5; or `auto`: keep the "
            "layers whose output is most similar to the end of their block, measured with the "
            "teacher on --calibration text"
        },
    )
    num_kept_layers: int | None = field(
        default=None,
        metadata={"help": "with --kept_layers auto: how many (default: as many as without it)"},
    )
    target_params: str | None = field(
        default=None,
        metadata={
            "help": "with --kept_layers auto: as many layers as fit in this many stored "
            "parameters, such as 3.1B or 350M"
        },
    )
    longest_block: int | None = field(
        default=None,
        metadata={
            "help": "with --kept_layers auto: most teacher layers that one student layer may stand "
            "for (default: as few as the number of layers allows, which gives the most sizes)"
        },
    )
    random_initialization: bool = field(
        default=False,
        metadata={"help": "start from random weights instead of the kept layers"},
    )

    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "how both models compute attention: sdpa, varlen (one document after another, "
            "faster in long rows), flash_attention_2, eager, ... (default: what transformers "
            "chooses)"
        },
    )

    def __post_init__(self) -> None:
        problems = []
        names = ("num_kept_layers", "target_params", "longest_block")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if given and not self.chooses_layers:
            problems.append(f"{' and '.join(given)} only applies with --kept_layers auto")
        if self.num_kept_layers is not None and self.target_params is not None:
            problems.append("--num_kept_layers and --target_params both set the size: give one")
        if self.teacher_fp8 and self.teacher_cache is not None:
            problems.append("teacher_fp8 has no effect with --teacher_cache, leave it out")
        if self.longest_block is not None and self.longest_block < 1:
            problems.append(f"longest_block={self.longest_block}: choose 1 or more")
        if self.target_params is not None:
            parse_count(self.target_params, "target_params")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def chooses_layers(self) -> bool:
        return self.kept_layers == "auto"

    def layer_map(self, teacher: PreTrainedConfig) -> LayerMap:
        """Return the layer map that the flags ask for, with the paper's numbers as defaults.
        `auto` is treated as if it were not given: `train.choose_layers` handles it.

        Raises ValueError for numbers out of range, or if both a list and numbers are given.
        """
        numbers = (
            self.first_layers_to_keep,
            self.alternate_every_n_layers,
            self.last_layers_to_keep,
        )
        num_layers = teacher.get_text_config().num_hidden_layers
        if self.kept_layers is not None and not self.chooses_layers:
            if any(number is not None for number in numbers):
                raise ValueError(
                    "--kept_layers already names every layer: leave out --first_layers_to_keep, "
                    "--alternate_every_n_layers and --last_layers_to_keep"
                )
            return LayerMap(tuple(parse_ranges(self.kept_layers, "kept_layers")), num_layers)
        paper = PAPER_LAYERS.get(teacher.model_type, PAPER_LAYERS_OTHERWISE)
        first, every, last = (
            default if number is None else number for number, default in zip(numbers, paper)
        )
        return LayerMap(default_kept_layers(num_layers, every, first, last), num_layers)
