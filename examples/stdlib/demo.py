"""Run the whole workflow on a small teacher: distill, evaluate every size, save one and use it.

    python -m examples.stdlib.demo

`train.train` distills a student from the shipped teacher on the source of the standard library, and
measures which order of patching and which scales suit it. `evaluate.evaluate` measures every size
on modules that neither model has seen, next to the teacher pruned in two ways. `patching.patch`
saves one size. Each command line is printed before it runs.

Another run in the same folder starts from the beginning, and removes what the one before made. Any
other folder must be new or empty.

With --variants, a student distilled from random weights for as many steps joins the sweep, and
`evaluate.report` compares the measured order with `last` and `first` as they are in the paper,
without scales.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.commands import run
from examples.own_folder import OwnFolder, Sign
from examples.stdlib.corpus import is_held_out, iter_modules, write_corpus
from examples.stdlib.tasks import TASK_NAMES, write_tasks
from patching.cli.command_line import run_command, user_errors

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


MARK = "demo.json"
NAMES = ("corpus", "tasks", "student", "results", f"model_k{SAVED_SIZE}")
OF_VARIANTS = ("student_random", "results_last", "results_first", "orders")
"""The folders that the demo makes, and those that it makes with --variants."""
STUDENT, SWEEP, MODEL = (
    Sign(file_name, "examples/stdlib/teacher")
    for file_name in ("run.json", "family_k0.json", "provenance.json")
)
SIGNS = {
    "corpus": Sign("heldout.jsonl", '{"module": '),
    "tasks": Sign("stdlib_next_line.yaml", "task: stdlib_next_line"),
    **dict.fromkeys(("student", "student_random"), STUDENT),
    **dict.fromkeys(("results", "results_last", "results_first"), SWEEP),
    f"model_k{SAVED_SIZE}": MODEL,
    "orders": Sign("summary.md", "results_last"),
}
"""What shows that an earlier version of the demo, which left no mark, made a folder."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, default=Path("demo_output"))
    parser.add_argument(
        "--variants",
        action="store_true",
        help="also run the orders `last` and `first` and a student from random weights",
    )
    arguments = parser.parse_args(argv)
    folder = arguments.save_directory.absolute()
    with user_errors():
        own = OwnFolder(folder, MARK, SIGNS, needed=("corpus", "tasks", "student"))
        own.remove((*NAMES, *OF_VARIANTS) if arguments.variants else NAMES)
    baselines = make_and_measure(folder, own)
    if arguments.variants:
        make_variants(folder, own, baselines)


def make_and_measure(folder: Path, own: OwnFolder) -> list[object]:
    """Distill the student, evaluate every size and save one. Return the flags of the baselines."""
    with own.making("corpus") as corpus:
        sizes_bytes = write_corpus(corpus)
    with own.making("tasks") as tasks:
        write_tasks((module for module in iter_modules() if is_held_out(module.name)), tasks)
    print({name: f"{size / 1e6:.1f} MB" for name, size in sizes_bytes.items()})

    with own.making("student") as student:
        run(*distillation(folder, "student", *as_flags(RECIPE | ORDER)))
    baselines = [
        *("--baselines", "naive,block_influence"),
        *("--calibration", corpus / "train.jsonl"),
    ]
    with own.making("results") as results:
        run(*evaluation(folder, student, "results", *baselines))
    with own.making(f"model_k{SAVED_SIZE}") as model_folder:
        run(
            *("patching.patch", "--teacher_model_name_or_path", TEACHER),
            *("--student_model_name_or_path", student, "--num_layers_to_patch", SAVED_SIZE),
            *("--save_directory", model_folder),
        )
    print(f"\n{complete(model_folder, PROMPT)}\n")
    print(f"report: {results / 'summary.md'}")
    print(f"plot:   {results / 'summary.png'}")
    print(f"model:  {model_folder}")
    return baselines


def make_variants(folder: Path, own: OwnFolder, baselines: list[object]) -> None:
    """Distill a student from random weights, and compare the orders."""
    with own.making("student_random") as random_student:
        flags = ("--random_initialization", *as_flags(RECIPE))
        run(*distillation(folder, "student_random", *flags))
    student = folder / "student"
    # Results that are already in the folder are not computed again.
    with own.making("results") as results:
        flags = (*baselines, "--random_student", random_student)
        run(*evaluation(folder, student, "results", *flags))
    paper = []
    for order in ("last", "first"):
        with own.making(f"results_{order}") as of_order:
            flags = ("--order", order, "--match_scale", False)
            run(*evaluation(folder, student, of_order.name, *flags))
        paper.append(of_order)
    with own.making("orders") as orders:
        run("evaluate.report", results, *paper, "--save_directory", orders)


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
    run_command(main, "the demo starts from the beginning next time")
