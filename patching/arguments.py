"""Flags that name a family and calibration text. This is the one place where the command lines of
`patching` and `evaluate` turn flags into objects.

Declaring flags must stay fast, so nothing here imports torch or transformers until it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patching.cli.units import parse_ranges
from patching.patch_order import SEARCHED_ORDERS, current_spelling

if TYPE_CHECKING:
    import torch

    from patching.family import Family
    from patching.running.calibration import Calibration

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class CalibrationArguments:
    """Flags that name the text on which layers and models are compared."""

    _argument_group_name = "calibration text"

    calibration: str | None = field(
        default=None,
        metadata={
            "help": "text on which to compare layers and models: a .txt, .jsonl or .parquet file, "
            "a folder of them, or a hub dataset"
        },
    )
    calibration_config: str | None = field(
        default=None, metadata={"help": "configuration, if the calibration text is a hub dataset"}
    )
    calibration_split: str = field(
        default="train", metadata={"help": "split, if the calibration text is a hub dataset"}
    )
    calibration_column: str = field(
        default="text", metadata={"help": "column of the calibration text"}
    )
    calibration_texts: int = field(
        default=64,
        metadata={"help": "how many documents of the calibration text to use, from its start"},
    )
    calibration_skip: int = field(
        default=0, metadata={"help": "how many documents to skip before those, for another sample"}
    )
    calibration_length: int = field(
        default=256,
        metadata={"help": "how many tokens of each calibration document to use, from its start"},
    )

    def check_calibration(self, needed_since: str | None = None) -> list[str]:
        """Problems with these flags, one line each. `needed_since` says why text is needed; if it
        is given, naming none is a problem too.
        """
        problems = [
            f"{name}={value}: choose {least} or more"
            for name, value, least in (
                ("calibration_texts", self.calibration_texts, 1),
                ("calibration_skip", self.calibration_skip, 0),
                ("calibration_length", self.calibration_length, 2),
            )
            if value < least
        ]
        if needed_since and self.calibration is None:
            problems.append(f"{needed_since}: name some with --calibration")
        return problems

    def read_calibration(self) -> Calibration:
        """The calibration text. Raises ValueError or OSError if there is none."""
        from patching.running.calibration import Calibration

        return Calibration.read(
            self.calibration,
            dataset_config=self.calibration_config,
            dataset_split=self.calibration_split,
            text_column=self.calibration_column,
            num_texts=self.calibration_texts,
            skip=self.calibration_skip,
            length=self.calibration_length,
        )


@dataclass
class FamilyArguments:
    """Flags that name a family, for every command line that builds intermediate models."""

    _argument_group_name = "the family: teacher, student, order"

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    student_model_name_or_path: str = field(
        metadata={
            "help": "the student: a folder or a hub repository with a student_config.json, or one "
            "of the public students whose layers are known"
        }
    )
    kept_layers: str | None = field(
        default=None,
        metadata={
            "help": "teacher layers that the student was initialized from, such as 0,2,4,7,9,11, "
            "for a student without a student_config.json"
        },
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "the teacher's branch, tag or commit (default: main)"},
    )
    student_revision: str | None = field(
        default=None,
        metadata={"help": "the student's branch, tag or commit (default: main)"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run modeling code that comes with a model"}
    )
    order: str | None = field(
        default=None,
        metadata={
            "help": "which layers are patched first as k grows: last, first, whole_periods (keeps "
            "the teacher's pattern of sliding and full attention at some sizes), klpatch or "
            "block_influence (searched on --calibration), or a JSON file with a list of student "
            "layers, such as the order.json of patching.orders (by default the order in "
            "student_config.json, else `first` for a llama and `last` for any other model_type)"
        },
    )
    match_scale: bool = field(
        default=True,
        metadata={
            "help": "rescale student layers in the sizes for which factors were measured, by "
            "training or patching.orders; False is the paper's way"
        },
    )
    patch_first_k_layers: bool = field(default=False, metadata={"help": "same as --order first"})
    override_llama_patching: bool = field(
        default=False,
        metadata={
            "help": "obey --patch_first_k_layers even if it is not given, so that a llama is "
            "patched from the last layer"
        },
    )

    def __post_init__(self) -> None:
        if self.order is not None:
            self.order = current_spelling(self.order)

    @property
    def searches_order(self) -> bool:
        """Whether `--order` names a search rather than an order."""
        return self.order in SEARCHED_ORDERS

    def requested_order(self) -> str | None:
        """The order the flags ask for: a name or a file. None leaves it to the student, or to a
        search.

        Raises ValueError for two orders at once.
        """
        if self.order is not None and (self.patch_first_k_layers or self.override_llama_patching):
            raise ValueError(
                f"--order {self.order} and --patch_first_k_layers or --override_llama_patching "
                "both name an order: give one of them"
            )
        if self.patch_first_k_layers:
            return "first"
        if self.override_llama_patching:
            return "last"
        return None if self.searches_order else self.order

    def open_family(self, **how: Any) -> Family:
        """The family these flags name. `how` says how its weights are loaded: keyword arguments of
        `Family.from_pretrained`, which also says what is raised.
        """
        from patching.family import Family

        kept_layers = self.kept_layers
        return Family.from_pretrained(
            self.teacher_model_name_or_path,
            self.student_model_name_or_path,
            self.requested_order(),
            revision=self.revision,
            student_revision=self.student_revision,
            kept_layers=None if kept_layers is None else parse_ranges(kept_layers, "kept_layers"),
            match_scale=self.match_scale,
            trust_remote_code=self.trust_remote_code,
            **how,
        )


@dataclass
class MeasuringArguments(FamilyArguments):
    """Flags that also say how the weights run, for command lines that measure models."""

    _argument_group_name = "how models run"

    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the weights; auto is the teacher's", "choices": DTYPES},
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cuda, cuda:1, mps or cpu; by default a GPU if there is one"},
    )

    def open_measured(self, device: torch.device, **how: Any) -> Family:
        """The family these flags name, in the dtype that they name, on a device. It raises what
        `open_family` does, and warns of a dtype that is slow on the device.
        """
        from patching.devices import warn_if_slow

        family = self.open_family(dtype=self.dtype, device=device, **how)
        warn_if_slow(device, family.dtype, "--dtype float32")
        return family
