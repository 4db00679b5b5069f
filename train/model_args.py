"""Flags that say what is distilled: the teacher and the layers its student keeps."""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from patching.blocks import LayerMap, default_kept_layers
from patching.cli.units import parse_count, parse_ranges

PAPER_LAYERS = {"llama": (2, 2, 1)}
"""first_layers_to_keep, alternate_every_n_layers, last_layers_to_keep by model_type."""
PAPER_LAYERS_OTHERWISE = (1, 2, 2)


@dataclass
class ModelArguments:
    _argument_group_name = "the teacher and its layers"

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    revision: str | None = field(
        default=None, metadata={"help": "the teacher's branch, tag or commit"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run modelling code that comes with the teacher"}
    )
    alternate_every_n_layers: int | None = field(
        default=None, metadata={"help": "keep every n-th teacher layer, by default every 2nd"}
    )
    first_layers_to_keep: int | None = field(
        default=None,
        metadata={"help": "first teacher layers, all kept; by default 2 for a llama, else 1"},
    )
    last_layers_to_keep: int | None = field(
        default=None,
        metadata={"help": "last teacher layers, all kept; by default 1 for a llama, else 2"},
    )
    kept_layers: str | None = field(
        default=None,
        metadata={
            "help": "teacher layers to keep by number, such as 0,1,3-5, instead of the above; or "
            "auto: those whose states are nearest to the end of their blocks, by the teacher's "
            "states on --calibration text"
        },
    )
    num_kept_layers: int | None = field(
        default=None,
        metadata={"help": "with --kept_layers auto: how many, by default as many as without it"},
    )
    target_params: str | None = field(
        default=None,
        metadata={
            "help": "with --kept_layers auto: as many as give at most so many stored parameters: "
            "3.1B, 350M"
        },
    )
    longest_block: int | None = field(
        default=None,
        metadata={
            "help": "with --kept_layers auto: most teacher layers that one layer may stand for, by "
            "default no more than the number of layers asks for, which gives the most sizes"
        },
    )
    random_initialization: bool = field(
        default=False,
        metadata={"help": "start the student from random weights instead of the kept layers'"},
    )

    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "how both models compute attention: sdpa, flash_attention_2, eager, ...; by "
            "default what transformers chooses"
        },
    )

    def __post_init__(self) -> None:
        problems = []
        names = ("num_kept_layers", "target_params", "longest_block")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if given and not self.chooses_layers:
            problems.append(f"{' and '.join(given)} belongs to --kept_layers auto")
        if self.num_kept_layers is not None and self.target_params is not None:
            problems.append("--num_kept_layers and --target_params both name a size: give one")
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
        """The kept layers that the flags name; what they leave open follows the paper, as does
        `auto`, which chooses elsewhere.

        Raises ValueError for numbers out of range, and for a list beside the numbers it replaces.
        """
        numbers = (
            self.first_layers_to_keep,
            self.alternate_every_n_layers,
            self.last_layers_to_keep,
        )
        num_layers = teacher.num_hidden_layers
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
