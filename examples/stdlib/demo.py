"""Run the whole workflow on a small teacher: distill, evaluate every size, save one and use it.

    python -m examples.stdlib.demo

`train.train` distills a student from the shipped teacher on the source of the standard library, and
measures which order of patching and which scales suit it. `evaluate.evaluate` measures every size
on modules that neither model has seen, next to the teacher pruned in two ways. `patching.patch`
saves one size. Each command line is printed before it runs.

With --variants, a student distilled from random weights for as many steps joins the sweep, and
`evaluate.report` compares the measured order with `last` and `first` as they are in the paper,
without scales.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.stdlib.corpus import is_held_out, iter_modules, write_corpus
from examples.stdlib.tasks import TASK_NAMES, write_tasks
from patching.cli.command_line import run_command

ROOT = Path(__file__).parents[2]
TEACHER = Path(__file__).parent / "teacher"
SAVED_SIZE = 3
PROMPT = "def main(argv=None):\n    parser = argparse.ArgumentParser(description="

DISTILLATION = {
    "max_length": 256,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_steps": 120,
    "learning_rate": 5e-4,
    "cosine_loss_weight": 10,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 10,
    "per_device_eval_batch_size": 16,
    "measure_order": False,
}
"""What the studies distill with, too."""
RECIPE = {
    "learning_rate": 2e-3,
    "cosine_loss_weight": 100,
    "per_device_train_batch_size": 8,
    "max_steps": 240,
    "kept_layers": "0,1,2,4,6,8,10",
}
"""The demo's own settings, chosen on training text by `examples.studies.recipe`."""
ORDER = {"measure_order": True, "order_documents": 32}


def main(folder: Path, variants: bool) -> None:
    for name in ("corpus", "tasks", "student", "results", f"model_k{SAVED_SIZE}"):
        shutil.rmtree(folder / name, ignore_errors=True)
    sizes_bytes = write_corpus(folder / "corpus")
    write_tasks((module for module in iter_modules() if is_held_out(module.name)), folder / "tasks")
    print({name: f"{size / 1e6:.1f} MB" for name, size in sizes_bytes.items()})

    student = distill(folder, "student", *as_flags(RECIPE | ORDER))
    baselines = [
        *("--baselines", "naive,block_influence"),
        *("--calibration", folder / "corpus" / "train.jsonl"),
    ]
    results = evaluate(folder, student, "results", *baselines)
    model_folder = folder / f"model_k{SAVED_SIZE}"
    run(
        *("patching.patch", "--teacher_model_name_or_path", TEACHER),
        *("--student_model_name_or_path", student, "--num_layers_to_patch", SAVED_SIZE),
        *("--save_directory", model_folder),
    )
    print(f"\n{complete(model_folder, PROMPT)}\n")
    print(f"report: {results / 'summary.md'}")
    print(f"plot:   {results / 'summary.png'}")
    print(f"model:  {model_folder}")

    if variants:
        for name in ("student_random", "results_last", "results_first", "orders"):
            shutil.rmtree(folder / name, ignore_errors=True)
        random_student = distill(
            folder, "student_random", "--random_initialization", *as_flags(RECIPE)
        )
        # Results that are already in the folder are not computed again.
        evaluate(folder, student, "results", *baselines, "--random_student", random_student)
        paper = [
            evaluate(folder, student, f"results_{order}", "--order", order, "--match_scale", False)
            for order in ("last", "first")
        ]
        run("evaluate.report", results, *paper, "--save_directory", folder / "orders")


def distill(folder: Path, name: str, *flags: str) -> Path:
    """Distill a student into `folder/name` with `train.train`. Return that folder."""
    run(*distillation(folder, name, *flags))
    return folder / name


def evaluate(folder: Path, student: Path, name: str, *flags: object) -> Path:
    """Evaluate every size into `folder/name` with `evaluate.evaluate`. Return that folder."""
    run(*evaluation(folder, student, name, *flags))
    return folder / name


def distillation(folder: Path, name: str, *flags: object) -> list[object]:
    """The module and arguments that distill a student into `folder/name`."""
    return [
        *("train.train", "--teacher_model_name_or_path", TEACHER),
        *("--save_directory", folder / name),
        *("--dataset", folder / "corpus" / "train.jsonl"),
        *("--eval_dataset", folder / "corpus" / "heldout.jsonl"),
        *("--resume_from_checkpoint", "last"),
        *as_flags(DISTILLATION),
        *flags,
    ]


def as_flags(settings: Mapping[str, object]) -> list[object]:
    """Settings as the words of a command line."""
    return [part for flag, value in settings.items() for part in (f"--{flag}", value)]


def evaluation(folder: Path, student: Path, name: str, *flags: object) -> list[object]:
    """The module and arguments that evaluate every size into `folder/name`."""
    return [
        *("evaluate.evaluate", "--teacher_model_name_or_path", TEACHER),
        *("--student_model_name_or_path", student, "--save_directory", folder / name),
        *("--num_layers_to_patch", "all", "--tasks", ",".join(TASK_NAMES)),
        *("--include_path", folder / "tasks", "--eval_batch_size", "16"),
        *flags,
    ]


def run(module: str, *arguments: object) -> None:
    """Print and run `python -m module arguments`. Raises CalledProcessError if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python -m {module} {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=True)


def complete(model_folder: Path, prompt: str) -> str:
    """The prompt and the saved model's continuation, up to the end of the line."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, default=Path("demo_output"))
    parser.add_argument(
        "--variants",
        action="store_true",
        help="also run the orders `last` and `first` and a student from random weights",
    )
    arguments = parser.parse_args()
    folder, variants = arguments.save_directory.resolve(), arguments.variants
    run_command(lambda: main(folder, variants), "the demo starts from the beginning next time")
