"""Flags that name a family and calibration text, and what they become: the one place where the
command lines of `patching` and `evaluate` turn flags into objects.

Declaring flags must stay fast, so nothing here imports torch or transformers until it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patching.cli.units import parse_ranges
from patching.patch_order import SEARCHED_ORDERS, current_spelling

if TYPE_CHECKING:
    from patching.family import Family
    from patching.running.calibration import Calibration

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class CalibrationArguments:
    """Flags that name the text layers and models are compared on."""

    calibration: str | None = field(
        default=None,
        metadata={
            "help": "text to compare layers and models on: a .txt, .jsonl or .parquet file, a "
            "folder of them, or a hub dataset"
        },
    )
    calibration_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub dataset of calibration text"}
    )
    calibration_split: str = field(
        default="train", metadata={"help": "split of a hub dataset of calibration text"}
    )
    calibration_column: str = field(
        default="text", metadata={"help": "column that holds the calibration text"}
    )
    calibration_texts: int = field(
        default=64, metadata={"help": "documents of the calibration text, its first ones"}
    )
    calibration_skip: int = field(
        default=0, metadata={"help": "documents passed over before those, for another sample"}
    )
    calibration_length: int = field(
        default=256, metadata={"help": "tokens of each calibration document, its first ones"}
    )

    def check_calibration(self, needed_since: str | None = None) -> list[str]:
        """What is wrong with these flags; that no text is named too, where there is a reason to
        need some.
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
    """Flags that name a family: shared by every command line that builds intermediate models."""

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    student_model_name_or_path: str = field(
        metadata={
            "help": "the student: a folder or a hub repository, with its student_config.json, or "
            "one of the public students whose layers are known"
        }
    )
    kept_layers: str | None = field(
        default=None,
        metadata={
            "help": "teacher layers that the student was made from, such as 0,2,4,7,9,11, for a "
            "student that does not say so itself"
        },
    )
    revision: str | None = field(
        default=None, metadata={"help": "the teacher's branch, tag or commit"}
    )
    student_revision: str | None = field(
        default=None, metadata={"help": "the student's branch, tag or commit"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run modelling code that comes with a model"}
    )
    order: str | None = field(
        default=None,
        metadata={
            "help": "which layers are patched as k grows: last, first, klpatch or block_influence "
            "(searched on --calibration), or a JSON file with a list of student layers, such as "
            "the order.json of patching.orders "
            "(by default what student_config.json records, else `first` for a llama and `last` "
            "for any other "
            "model_type)"
        },
    )
    patch_first_k_layers: bool = field(
        default=False, metadata={"help": "the same as --order first"}
    )
    override_llama_patching: bool = field(
        default=False,
        metadata={
            "help": "obey --patch_first_k_layers even where it is absent, so that a llama is "
            "patched last first"
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
            trust_remote_code=self.trust_remote_code,
            **how,
        )


@dataclass
class MeasuringArguments(FamilyArguments):
    """And how their weights are run, for command lines that measure them."""

    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the weights, auto: the teacher's", "choices": DTYPES},
    )
    device: str | None = field(
        default=None,
        metadata={"help": "cuda, cuda:1, mps or cpu; by default a GPU where there is one"},
    )
