"""The flags of `train.train`, by group."""

from typing import NamedTuple

from patching.arguments import CalibrationArguments
from patching.cli.command_line import CommandLineParser
from train.data_args import DataArguments
from train.model_args import ModelArguments
from train.training_args import DistillationArguments


class Flags(NamedTuple):
    model: ModelArguments
    data: DataArguments
    training: DistillationArguments
    calibration: CalibrationArguments


def parse_flags(argv: list[str] | None = None, description: str | None = None) -> Flags:
    """Parse a command line, by default this process's.

    Raises ValueError for values that are out of range or do not go together.
    """
    groups = (ModelArguments, DataArguments, DistillationArguments, CalibrationArguments)
    parser = CommandLineParser(groups, prog="train.train", description=description)
    flags = Flags(*parser.parse_args_into_dataclasses(argv))
    if flags.model.chooses_layers:
        if problems := flags.calibration.check_calibration("--kept_layers auto needs text"):
            raise ValueError("; ".join(problems))
    elif flags.calibration.calibration is not None:
        raise ValueError("--calibration only applies with --kept_layers auto")
    return flags
