"""Distill a student of SmolLM2-135M-Instruct with `train.train`.

    python -m examples.smollm2.distill --save_directory smollm2_output

The student keeps 16 of the teacher's 30 layers and is saved in `smollm2_output/student`
(`student_auto` with --kept_layers auto). A run that was stopped goes on from its last checkpoint
when the same command is given again. With --own_chats 256, half of the steps train on that many
chats that the teacher writes itself, and the student is in `student_chats`. Further flags are
passed on to `train.train`, after those of the example, so that they prevail: `--max_steps 100`
makes a shorter run.
"""

import argparse
import shutil
from pathlib import Path

from examples.commands import run
from examples.smollm2.own_chats import write_own_chats
from examples.smollm2.tasks import write_passages
from examples.smollm2.text import Text, add_flags, choose_text, own_folder, student_folder
from examples.stdlib.demo import as_flags
from patching.cli.command_line import run_command, user_errors

DISTILLATION = {
    "max_length": 256,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 400,
    "learning_rate": 8e-4,
    "warmup_steps": 10,
    "kl_loss_weight": 1,
    "cosine_loss_weight": 10,
    "save_steps": 100,
    "eval_steps": 100,
    "per_device_eval_batch_size": 8,
    "measure_order": False,  # examples.smollm2.evaluate does, on fewer texts
}


def distill(
    folder: Path, text: Text, kept_layers: str, flags: list[str], num_own_chats: int = 0
) -> Path:
    """Distill a student of `folder/teacher`, or go on with it, and return its folder."""
    student = student_folder(folder, kept_layers)
    settings = as_flags(DISTILLATION)
    if num_own_chats:
        student = student.with_name(f"{student.name}_chats")
        settings += ["--sft_dataset", write_own_chats(folder, num_own_chats)]
    if text.held_out is not None:
        settings += ["--eval_dataset", write_passages(text.held_out, folder / "heldout.jsonl")]
    if shutil.which("g++"):  # what torch.compile compiles with on a CPU
        settings += ["--torch_compile", "True"]
    if kept_layers == "auto":
        settings += ["--kept_layers", "auto", "--calibration", text.train]
    run(
        *("train.train", "--teacher_model_name_or_path", folder / "teacher"),
        *("--save_directory", student, "--dataset", text.train),
        *settings,
        *("--resume_from_checkpoint", "last", *flags),
    )
    return student


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--own_chats", type=int, default=0, help="chats by the teacher itself")
    arguments, flags = parser.parse_known_args(argv)
    folder = arguments.save_directory.resolve()
    with user_errors():
        own_folder(folder).mark()
        text = choose_text(arguments.dataset, arguments.eval_dataset, folder)
        distill(folder, text, arguments.kept_layers, flags, arguments.own_chats)


if __name__ == "__main__":
    run_command(main, "the same command goes on")
