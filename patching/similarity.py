"""How near each student layer is to the end of its teacher block, before and after distillation.

    python -m patching.similarity --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --calibration TEXT --save_directory DIR

A layer that ends where its block does can be put in the block's place: what patching lives on. Of
each aligned pair of hidden states (the ones the loss compares) the cosine, mean over the text's
tokens; before distillation the student is the kept teacher layers. DIR receives similarity.md,
similarity.json and similarity.png.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patching.arguments import CalibrationArguments, MeasuringArguments
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.cli.command_line import CommandLineParser, check_one_process, user_errors
from patching.family import Family, usable_device
from patching.files.outputs import check_writable, environment, write_json, write_text
from patching.files.plot import plot_lines, save_figure
from patching.recipe import initial_student
from patching.running.calibration import Calibration
from patching.running.similarity import similarity_to_teacher

FILE_NAME = "similarity"


@dataclass
class SimilarityArguments(CalibrationArguments, MeasuringArguments):
    save_directory: Path = field(kw_only=True, metadata={"help": "folder for table and plot"})

    def __post_init__(self) -> None:
        if problems := self.check_calibration("hidden states are compared on text"):
            raise ValueError("; ".join(problems))


def rows_of(
    layer_map: LayerMap, before: Sequence[float], after: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each aligned pair: the embedding, then each student layer with its block."""
    names = ["embedding", *range(len(layer_map.kept))]
    blocks = [None, *([block.start, block.stop - 1] for block in layer_map.blocks)]
    return [
        {"student_layer": name, "teacher_block": block, "before": b, "after": a}
        for name, block, b, a in zip(names, blocks, before, after)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
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
        family = Family.from_pretrained(arguments)
        device, dtype = usable_device(arguments.device), family.dtype(arguments.dtype)
        text = Calibration.read(arguments)
        batches = text.batches(family.tokenizer, family.configs["teacher"])
        models = family.load(["teacher", "student"], dtype, device)
    teacher, layer_map = models["teacher"], family.layer_map
    before, after = (
        similarity_to_teacher(student, teacher, layer_map.alignment_pairs, batches)
        for student in (
            assemble(initial_student(layer_map), teacher=teacher),
            models["student"].eval(),
        )
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
    title = f"Cosine of hidden states with the teacher's, mean over the tokens of {text.name}"
    write_text(
        folder / f"{FILE_NAME}.md", f"{title}\n\n{table(rows)}\n\n![Cosine](similarity.png)\n"
    )
    print(table(rows))
    print(f"table and plot: {folder / FILE_NAME}.md, .json, .png")


if __name__ == "__main__":
    main()
