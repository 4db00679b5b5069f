"""The finished student and what made it: saved at once, recognized when requeued, uploaded."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from patching.checkpoints.companions import Companions
from patching.checkpoints.hub import push
from patching.checkpoints.origin import Origin
from patching.files.json_files import MOST_BYTES_OF_RECORDS, has_type, read_object
from patching.files.outputs import environment, follow_umask, move_into_place, write_json
from patching.student_config import StudentConfig
from train.checkpoints.identity import differences, read_settings
from train.student_card import training_facts, write_student_card
from train.trainer import DistillationTrainer
from train.training_args import DistillationArguments

RUN_FILE_NAME = "run.json"
PLOT_FILE_NAME = "loss.png"
ORDER_FILE_NAME = "order.json"
MEASURED_ORDER_FILE_NAME = "order_kl.json"


class Made(NamedTuple):
    """What made a student."""

    arguments: dict[str, Any]
    """All flags as they were given."""
    settings: dict[str, Any]
    """Those that identify the run, see `train.checkpoints.identity`."""
    teacher: PreTrainedConfig
    origin: Origin
    student_config: StudentConfig


def save_run(made: Made, trainer: DistillationTrainer, companions: Companions) -> None:
    """Save the student and what made it. Files appear in `save_directory` once all are written.

    `companions` are the files from the teacher.
    """
    from train.plot import plot_terms  # imports matplotlib

    args = trainer.args
    held_out = held_out_metrics(trainer)
    values = {
        "arguments": made.arguments,
        "settings": made.settings,
        "student": made.student_config.to_dict(),
        "student_step": trainer.student_step,
        "held_out": held_out,
        "log": trainer.state.log_history,
        "peak_memory_gib": trainer.log_line.peak_memory_gib,
        "environment": environment(),
    }
    save_directory = Path(args.save_directory)
    save_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save_directory, prefix=".incomplete-") as folder:
        staging = Path(folder)
        trainer.save_student(staging, getattr(torch, args.save_dtype))
        if args.should_save:
            companions.write(staging)
            made.student_config.save(staging)
            write_student_card(
                staging,
                repository_of(args),
                made.origin,
                made.teacher,
                made.student_config,
                training_facts(values),
                held_out,
            )
            names = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
            values["files"] = sorted(name.as_posix() for name in names)
            write_json(staging / RUN_FILE_NAME, values)
            plot_terms(trainer.state.log_history, staging / PLOT_FILE_NAME)
            follow_umask(staging)
            move_into_place(staging, save_directory)


def held_out_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """Return the metrics of the weights to save on the held-out rows; empty if none are held
    out.
    """
    if trainer.eval_dataset is None:
        return {}
    lines = reversed(trainer.state.log_history)
    of_step = (line for line in lines if line["step"] == trainer.student_step)
    metrics = next((line for line in of_step if "eval_loss" in line), None) or trainer.evaluate()
    return {name: value for name, value in metrics.items() if name.startswith("eval_")}


def recorded_settings(args: DistillationArguments, checkpoint: str | None) -> dict[str, Any] | None:
    """Return the settings of the run that this one repeats or resumes: those of the student in
    `save_directory`, else those of the checkpoint, or None.
    """
    path = Path(args.save_directory, RUN_FILE_NAME)
    if args.resumes and path.is_file():
        return read_object(path, most_bytes=MOST_BYTES_OF_RECORDS).get("settings")
    return None if checkpoint is None else read_settings(checkpoint)


def is_finished(args: DistillationArguments, settings: dict[str, Any]) -> bool:
    """Whether `save_directory` already holds the student of this very run, as it does when a
    finished run is queued again.

    Raises ValueError if it holds another model.
    """
    folder = Path(args.save_directory)
    if not (folder / "config.json").exists():
        return False
    path, found = folder / RUN_FILE_NAME, ["no run.json says what made it"]
    run = read_object(path, most_bytes=MOST_BYTES_OF_RECORDS) if path.is_file() else {}
    if has_type(run.get("settings"), dict) and has_type(run.get("arguments"), dict):
        stored = run["arguments"].get("save_dtype", args.save_dtype)
        before = run["settings"] | {"save_dtype": stored}
        found = differences(before, settings | {"save_dtype": args.save_dtype})
    if found:
        raise ValueError(
            f"{folder} already holds a model of another run ({'; '.join(found)}): name another "
            "--save_directory, or remove it"
        )
    return True


def repository_of(args: DistillationArguments) -> str:
    return args.hub_model_id or Path(args.save_directory).resolve().name


def upload(args: DistillationArguments) -> str:
    """Upload the finished student, of all files in its folder those that make it up, and return its
    address. Raises OSError if that fails, and ValueError if nothing says which files these are.
    """
    folder, repository = Path(args.save_directory), repository_of(args)
    names = read_object(folder / RUN_FILE_NAME, most_bytes=MOST_BYTES_OF_RECORDS).get("files")
    if not has_type(names, list[str]):
        raise ValueError(
            f"{folder / RUN_FILE_NAME} does not list the files of the student, as of an older "
            f"version: upload what you choose with `hf upload {repository} {folder}`"
        )
    return push(folder, repository, args.public, "Upload student", names)
