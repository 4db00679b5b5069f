"""Measure how close each student layer comes to the end of its teacher block, before and after
distillation.

    python -m patching.similarity --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --calibration TEXT --save_directory DIR

A student layer whose output is close to the end of its block can be replaced by the block, which is
what patching relies on. For each aligned pair of hidden states (the pairs that the loss compares)
this is their cosine, averaged over the tokens of the text. Before distillation the student is the
kept teacher layers. DIR receives similarity.md, similarity.json and similarity.png.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patching.arguments import CalibrationArguments, FamilyArguments, MeasuringArguments
from patching.blocks import LayerMap
from patching.cli.command_line import (
    CommandLineParser,
    check_one_process,
    run_command,
    user_errors,
)
from patching.files.outputs import check_writable, environment, write_json, write_text

FILE_NAME = "similarity"


@dataclass
class SimilarityArguments(CalibrationArguments, MeasuringArguments):
    _argument_group_name = "the result"

    save_directory: Path = field(kw_only=True, metadata={"help": "folder for table and plot"})

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self.check_calibration("hidden states are compared on text")
        problems += [
            f"--{name} is about sizes between student and teacher, but only the student is "
            "measured here: leave it out"
            for name in ("order", "match_scale", "patch_first_k_layers", "override_llama_patching")
            if getattr(self, name) != FamilyArguments.__dataclass_fields__[name].default
        ]
        if problems:
            raise ValueError("; ".join(problems))


def rows_of(
    layer_map: LayerMap, before: Sequence[float], after: Sequence[float]
) -> list[dict[str, Any]]:
    """One row per aligned pair: the embedding, then each student layer with its block."""
    names = ["embedding", *range(len(layer_map.kept))]
    blocks = [None, *([block.start, block.stop - 1] for block in layer_map.blocks)]
    return [
        {"student_layer": name, "teacher_block": block, "before": b, "after": a}
        for name, block, b, a in zip(names, blocks, before, after)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| student layer | teacher block | before distillation | after |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in rows:
        block = "-"
        if row["teacher_block"]:
            start, last = row["teacher_block"]
            block = f"{start}-{last}" if last > start else f"{start}"
        lines.append(
            f"| {row['student_layer']} | {block} | {row['before']:.4f} | {row['after']:.4f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        check_one_process()
        parser = CommandLineParser(
            SimilarityArguments, prog="patching.similarity", description=__doc__
        )
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        folder = arguments.save_directory
        check_writable(folder)

        from patching.assemble import assemble
        from patching.devices import usable_device
        from patching.files.plot import plot_lines, save_figure
        from patching.recipe import initial_student
        from patching.running.similarity import similarity_to_teacher

        device = usable_device(arguments.device)
        family = arguments.open_measured(device)
        text = arguments.read_calibration()
        batches = text.batches(family.tokenizer, family.configs["teacher"])
        models = family.parents.load(("teacher", "student"))
    teacher, layer_map = models["teacher"], family.layer_map
    students = (assemble(initial_student(layer_map), teacher=teacher), models["student"].eval())
    before, after = (
        similarity_to_teacher(student, teacher, layer_map.alignment_pairs, batches)
        for student in students
    )
    rows = rows_of(layer_map, before, after)
    layers = rows[1:]
    lines = {
        name: [(row["student_layer"], row[key]) for row in layers]
        for name, key in (("before distillation", "before"), ("after", "after"))
    }
    figure = plot_lines(lines, "student layer", "cosine with the end of its teacher block")
    figure.axes[0].set_xticks(range(len(layers)))
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / f"{FILE_NAME}.png")
    values = {"text": text.name, "arguments": asdict(arguments), "environment": environment()}
    write_json(folder / f"{FILE_NAME}.json", {"layers": rows, **values})
    title = f"Cosine between student and teacher hidden states, mean over the tokens of {text.name}"
    write_text(
        folder / f"{FILE_NAME}.md", f"{title}\n\n{table(rows)}\n\n![Cosine](similarity.png)\n"
    )
    print(table(rows))
    print(f"table and plot: {folder / FILE_NAME}.md, .json, .png")


if __name__ == "__main__":
    run_command(main)
