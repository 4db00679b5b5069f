"""Flags that say what is distilled: the teacher and the layers its student keeps."""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from patching.blocks import LayerMap, default_kept_layers, parse_ranges

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
            "help": "teacher layers to keep by number, such as 0,1,3-5, instead of the above"
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

    def layer_map(self, teacher: PreTrainedConfig) -> LayerMap:
        """The kept layers that the flags name; what they leave open follows the paper.

        Raises ValueError for numbers out of range, and for a list beside the numbers it replaces.
        """
        numbers = (
            self.first_layers_to_keep,
            self.alternate_every_n_layers,
            self.last_layers_to_keep,
        )
        num_layers = teacher.num_hidden_layers
        if self.kept_layers is not None:
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
