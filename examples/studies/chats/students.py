"""The teachers, students and sweeps of the study, as command lines. What is finished is not done
again.

`chat` is the shipped teacher trained on chats. `apart` is the same with another seed and a larger
learning rate, which takes its layers further away from those they were.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.commands import run_here
from examples.stdlib.chat_data import NEW_SUMS, SYSTEM, TASK_NAMES
from examples.stdlib.demo import DISTILLATION, TEACHER, as_flags
from examples.studies.claims.students import missing_sweeps

TEXT_TASK = "stdlib_bits_per_byte"
NUM_TEXTS = 10
"""Documents of the text task that are evaluated, which takes longer than all chats."""
SYSTEM_FLAGS = ("--apply_chat_template", "--system_instruction", SYSTEM)
ALL_SIZES, BELOW_TEACHER = "all", "0-4"
"""The teacher is the largest size of several sweeps, and is evaluated in one."""

TEACHERS: dict[str, tuple[object, ...]] = {
    "chat": (),
    "apart": ("--seed", 1, "--muon_lr", 0.2),
}
"""Each chat teacher's flags of `examples.stdlib.chat teacher`."""

SETTINGS = {
    name: value for name, value in DISTILLATION.items() if name != "per_device_eval_batch_size"
} | {
    "per_device_train_batch_size": 2,
    "max_steps": 60,
    "learning_rate": 1e-3,
    "heldout_documents": 0,
}
"""Those of `train.train` for every student: the demo's, with fewer tokens."""

STUDENTS: dict[str, tuple[str, float | None]] = {
    "two_phases": ("chat", 0.5),
    "text": ("chat", None),
    "chats": ("chat", 1.0),
    "base": ("base", None),
}
"""Each distilled student's teacher and `--sft_share`."""


class Sweep(NamedTuple):
    """A student, and the teacher whose layers are put back into it."""

    student: str
    teacher: str
    sizes: str = BELOW_TEACHER
    has_text: bool = False
    """Whether it is evaluated on text, too, and on sums that are in no chat."""


SWEEPS = {
    "two_phases": Sweep("two_phases", "chat", ALL_SIZES, has_text=True),
    "text": Sweep("text", "chat", has_text=True),
    "chats": Sweep("chats", "chat", has_text=True),
    "base_in_chat": Sweep("base", "chat"),
    "delta_to_chat": Sweep("delta_to_chat", "chat"),
    "base_in_apart": Sweep("base", "apart", ALL_SIZES),
    "delta_to_apart": Sweep("delta_to_apart", "apart"),
}


def make(
    folder: Path,
    seeds: Sequence[int],
    flags_of_all: Sequence[str] = (),
    num_documents: int | None = None,
) -> None:
    """Make and evaluate what is missing in `folder`, seed by seed.

    `flags_of_all` go to `train.train` for every student. Of each task, `num_documents` are
    evaluated, by default all, but NUM_TEXTS of text.
    """
    if not (folder / "data" / "tasks" / f"{TEXT_TASK}.yaml").is_file():
        run_here("examples.stdlib.chat", "data", "--save_directory", folder / "data")
    for teacher, flags in TEACHERS.items():
        if not (folder / teacher / "training.json").is_file():
            words = ("teacher", "--data", folder / "data", "--save_directory", folder / teacher)
            run_here("examples.stdlib.chat", *words, *flags)
    for seed in seeds:
        of_seed = folder / f"seed_{seed}"
        for name in STUDENTS:
            if not (of_seed / name / "config.json").is_file():
                run_here(*training(folder, name, seed, flags_of_all))
        for teacher in TEACHERS:
            student = of_seed / f"delta_to_{teacher}"
            if not student.is_dir():
                run_here(*weight_delta(of_seed / "base", folder / teacher, student))
        for sweep in SWEEPS:
            if missing_sweeps(folder, [seed], [sweep]):
                run_here(*evaluation(folder, of_seed, sweep, num_documents))


def training(folder: Path, name: str, seed: int, flags_of_all: Sequence[str]) -> list[object]:
    """The module and arguments that distill a student."""
    teacher, sft_share = STUDENTS[name]
    settings = SETTINGS | {
        "teacher_model_name_or_path": TEACHER if teacher == "base" else folder / teacher,
        "save_directory": folder / f"seed_{seed}" / name,
        "resume_from_checkpoint": "last",
        "dataset": folder / "data" / "corpus" / "train.jsonl",
    }
    if sft_share is not None:
        settings |= {"sft_dataset": folder / "data" / "chats.jsonl", "sft_share": sft_share}
    return ["train.train", *as_flags(settings), *flags_of_all, "--seed", seed]


def weight_delta(student: Path, teacher: Path, save_directory: Path) -> list[object]:
    """The module and arguments that move a base student to a teacher, however unlike it is."""
    return [
        *("train.weight_delta", "--student", student, "--teacher_from", TEACHER),
        *("--teacher_to", teacher, "--save_directory", save_directory, "--min_cosine", "-1"),
    ]


def evaluation(folder: Path, of_seed: Path, name: str, num_documents: int | None) -> list[object]:
    """The module and arguments that evaluate a family on chats and on text. The template does not
    change how text is scored.
    """
    sweep, tasks, chosen = SWEEPS[name], TASK_NAMES, {}
    if sweep.has_text:
        tasks = (*TASK_NAMES, NEW_SUMS, TEXT_TASK)
        chosen = {TEXT_TASK: [*range(NUM_TEXTS)]}
    limits = ("--samples", json.dumps(chosen)) if chosen else ()
    if num_documents is not None:
        limits = ("--limit", num_documents)
    return [
        *("evaluate.evaluate", "--teacher_model_name_or_path", folder / sweep.teacher),
        *("--student_model_name_or_path", of_seed / sweep.student),
        *("--save_directory", of_seed / "results" / name, "--num_layers_to_patch", sweep.sizes),
        *("--tasks", ",".join(tasks), "--include_path", folder / "data/tasks"),
        *("--eval_batch_size", 16, *SYSTEM_FLAGS),
        *limits,
    ]
