"""Evaluate all sizes between the student and SmolLM2-135M-Instruct with `evaluate.evaluate`.

    python -m examples.smollm2.evaluate --save_directory smollm2_output

measures every size in the order `first`, which is a Llama's, with the teacher pruned naively and by
block influence to the same depths, then every size in the orders `last` and KLPatch, and in the
best order that was found with the matched scale of each size. The pruned teacher is rescaled, too.
Then five sizes answer the same chat prompts. The reports are in `smollm2_output/results`:

    first/summary.md, .png    all sizes and the baselines; one folder for each other order
    orders/summary.md         the orders compared
    differences.md            each size against the baselines and the next smaller size
    pruned.md                 the family and the baselines, each as it is and rescaled
    chat.md                   the answers

What is measured already is not measured again.
"""

import argparse
import json
from pathlib import Path

from examples.commands import run
from examples.smollm2.chat import write_answers
from examples.smollm2.differences import write_differences
from examples.smollm2.pruned import write_pruned
from examples.smollm2.tasks import write_all_tasks
from examples.smollm2.text import Text, add_flags, choose_text, own_folder, student_folder
from patching.cli.command_line import run_command, user_errors
from patching.files.outputs import write_json
from patching.running.calibration import Calibration

CALIBRATION_TEXTS = 8
CALIBRATION_LENGTH = 128
HELD_OUT_TEXTS = 28
SEARCH = "klpatch"
"""The search whose order is evaluated too. All sets of the 14 patchable layers are too many."""


def evaluate(folder: Path, text: Text, kept_layers: str) -> Path:
    """Evaluate the family of `folder/teacher` and its student, and return the reports' folder."""
    teacher, student = folder / "teacher", student_folder(folder, kept_layers)
    results = folder / ("results" if kept_layers == "default" else f"results_{kept_layers}")
    family = [
        *("--teacher_model_name_or_path", teacher),
        *("--student_model_name_or_path", student),
    ]
    calibration = [
        *("--calibration", text.train),
        *("--calibration_texts", CALIBRATION_TEXTS, "--calibration_length", CALIBRATION_LENGTH),
    ]
    tasks = write_all_tasks(text, folder / "tasks")

    def sweep(name: str, order: object, *flags: object) -> Path:
        run(
            *("evaluate.evaluate", *family, "--save_directory", results / name),
            *("--order", order, "--num_layers_to_patch", "all", "--tasks", ",".join(tasks)),
            *("--include_path", folder / "tasks", "--eval_batch_size", "16"),
            *calibration,
            *flags,
        )
        return results / name

    sweeps = [sweep("first", "first", "--baselines", "naive,block_influence")]
    sweeps.append(sweep("last", "last"))
    run("patching.orders", *family, *calibration, "--save_directory", results / "search")
    best = results / "search" / "order.json"
    found = json.loads(best.read_text())
    order_file = results / "search" / f"{SEARCH}.json"
    order = found["orders"][SEARCH]["order"]
    write_json(order_file, {"order": order, "settings": found["settings"]})
    sweeps.append(sweep(SEARCH, order_file))
    sweeps.append(sweep("matched", best))
    run("evaluate.report", *sweeps, "--save_directory", results / "orders")
    write_differences(sweeps, results / "differences.md", {"matched": found["name"]})
    if text.held_out is not None:
        texts = (
            Calibration.read(name, num_texts=num_texts, length=CALIBRATION_LENGTH)
            for name, num_texts in (
                (text.train, CALIBRATION_TEXTS),
                (text.held_out, HELD_OUT_TEXTS),
            )
        )
        write_pruned((teacher, student), best, *texts, results)
    write_answers(teacher, student, best, results / "chat.md")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    arguments = parser.parse_args(argv)
    folder = arguments.save_directory.resolve()
    with user_errors():
        own_folder(folder).mark()
        text = choose_text(arguments.dataset, arguments.eval_dataset, folder)
    print(f"reports: {evaluate(folder, text, arguments.kept_layers)}")


if __name__ == "__main__":
    run_command(main, "the same command goes on")
