"""Choose the demo's recipe: which settings give the best family for the same budget?

    python -m examples.studies.recipe --folder F

distills a student of the shipped teacher with each recipe and seed, with its order and factors, and
measures its family on 48 modules that are set aside from the training text. The modules that the
demo's tables are made of are not read. Every recipe sees as many tokens as the demo, about two
minutes of training on one CPU core. It goes on where it was stopped, and `--recipes` does a part of
it. What all folders have by then is printed and written to `recipe.json`, `recipe.md` and
`recipe.png` in `--save_directory`, by default F.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from evaluate.result import read_results
from examples.commands import run_here
from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.demo import DISTILLATION, ORDER, as_flags, distillation, evaluation
from examples.stdlib.tasks import write_tasks
from examples.studies.claims.findings import BITS, Line, Lines, scores_table
from examples.studies.claims.picture import draw_panel
from examples.studies.record import GOES_ON, keep_settings, parse_seeds, study_parser, write_record
from patching.cli.command_line import run_command, user_errors
from patching.files.outputs import check_writable

NUM_SET_ASIDE = 48
BEFORE = {"learning_rate": 5e-4, "cosine_loss_weight": 10}
FASTER = {**BEFORE, "learning_rate": 2e-3}
EIGHT_ROWS = {"per_device_train_batch_size": 8, "max_steps": 240}
CHOSEN = {"kept_layers": "0,1,2,4,6,8,10"}
"""What `--kept_layers auto` chooses on the training text."""
RECIPES: dict[str, dict[str, Any]] = {
    "5e-4": BEFORE,
    "2e-3": FASTER,
    "4e-3": {**BEFORE, "learning_rate": 4e-3},
    "2e-3, KL 1": {**FASTER, "kl_loss_weight": 1.0},
    "2e-3, cosine 30": {**FASTER, "cosine_loss_weight": 30},
    "2e-3, cosine 100": {**FASTER, "cosine_loss_weight": 100},
    "2e-3, 8 rows": {**FASTER, **EIGHT_ROWS},
    "2e-3, rows of 128": {**FASTER, "max_length": 128, "max_steps": 240},
    "2e-3, kept 0,1,3,5,7,9,11": {**FASTER, "kept_layers": "0,1,3,5,7,9,11"},
    "2e-3, cosine 100, chosen layers": {**FASTER, "cosine_loss_weight": 100, **CHOSEN},
    "2e-3, cosine 100, 8 rows, chosen layers": {
        **FASTER,
        "cosine_loss_weight": 100,
        **EIGHT_ROWS,
        **CHOSEN,
    },
}
"""What differs from the demo's settings, by name."""


def make(folder: Path, recipe: str, seed: int) -> None:
    """Distill and evaluate one recipe's family, unless that is done."""
    student = f"seed_{seed}/{folder_name(recipe)}"
    if not (folder / student / "config.json").is_file():
        settings = {**ORDER, "seed": seed, **RECIPES[recipe]}
        run_here(*distillation(folder, student, *as_flags(settings)))
    if not (results := results_folder(folder, recipe, seed) / "summary.json").is_file():
        name = str(results.parent.relative_to(folder))
        run_here(*evaluation(folder, folder / student, name, "--tasks", BITS[0]))


def results_folder(folder: Path, recipe: str, seed: int) -> Path:
    return folder / f"seed_{seed}" / "results" / folder_name(recipe)


def folder_name(recipe: str) -> str:
    return recipe.replace(", ", "_").replace(" ", "_").replace(",", "-")


def write_texts(folder: Path) -> None:
    """Write the training text without what is set aside, and the task of what is."""
    if (folder / "tasks" / f"{BITS[0]}.yaml").is_file():
        return
    modules = [module for module in iter_modules() if not is_held_out(module.name)]
    drawn = random.Random(0).sample(range(len(modules)), NUM_SET_ASIDE)
    set_aside = [modules[i] for i in sorted(drawn)]
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    write_modules(set(modules) - set(set_aside), folder / "corpus" / "train.jsonl")
    write_modules(set(set_aside[:2]), folder / "corpus" / "heldout.jsonl")
    write_tasks(set_aside, folder / "tasks")


def write_modules(modules: set[Module], path: Path) -> None:
    lines = (json.dumps({"module": name, "text": text}) for name, text in sorted(modules))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(folder: Path, seeds: Sequence[int]) -> Lines:
    """The scores of the families that all seeds have by now, by recipe."""
    lines: Lines = {}
    for recipe in RECIPES:
        folders = [results_folder(folder, recipe, seed) for seed in seeds]
        if all((path / "summary.json").is_file() for path in folders):
            for path in folders:
                for result in read_results(path).values():
                    of_depth = lines.setdefault(recipe, {}).setdefault(result.depth, [])
                    of_depth.append(result.results[BITS[0]][BITS[1]])
    return lines


def write_findings(folder: Path, seeds: Sequence[int], save_directory: Path) -> None:
    """Print and write the scores of the recipes that are evaluated by now."""
    lines = read_lines(folder, seeds)
    means = {recipe: mean_of_sizes(line) for recipe, line in lines.items()}
    labels = {recipe: f"{recipe} (mean {means[recipe]:.4f})" for recipe in lines}
    text = scores_table(lines, labels, "recipe (mean of all sizes but the teacher)", digits=4)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    draw_panel(axes, "", "bits per byte (lower is better)", lines, labels)
    axes.get_legend().remove()
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    values = {
        "seeds": list(seeds),
        "demo": DISTILLATION,
        "recipes": {recipe: RECIPES[recipe] for recipe in lines},
        "bits_per_byte": lines,
        "mean_of_sizes": means,
    }
    write_record(save_directory, "recipe", text, figure, values)


def mean_of_sizes(line: Line) -> float:
    """The mean score of all sizes but the teacher."""
    return mean(score for depth in line if depth < max(line) for score in line[depth])


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    folder = arguments.folder.resolve()
    recipes = arguments.recipes.split("; ")
    with user_errors():
        seeds = parse_seeds(arguments.seeds)
        if unknown := [recipe for recipe in recipes if recipe not in RECIPES]:
            raise ValueError(f"recipes={unknown[0]}: choose from {'; '.join(RECIPES)}")
        check_writable(arguments.save_directory or folder)
        has_texts = (folder / "tasks" / f"{BITS[0]}.yaml").is_file()
        keep_settings(folder, {"distillation": DISTILLATION}, is_earlier=has_texts)
    write_texts(folder)
    for recipe in recipes:
        for seed in seeds:
            make(folder, recipe, seed)
    write_findings(folder, seeds, arguments.save_directory or folder)


def parser() -> argparse.ArgumentParser:
    parser = study_parser("recipe", __doc__)
    parser.add_argument("--recipes", default="; ".join(RECIPES), help="some of them, with `; `")
    return parser


if __name__ == "__main__":
    run_command(main, GOES_ON)
