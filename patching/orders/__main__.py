"""Search the order in which layers are patched, and say how far each order is from the best.

    python -m patching.orders --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --calibration TEXT --save_directory DIR

Each order is judged by the mean KL(teacher || model) of its sizes, per token of the calibration
text: `last`, `first`, `block_influence` (restore the most influential teacher layers first) and
`klpatch` (at each size, add the layer that gives the lowest KL). --beam widens the search. --exact
measures every set of layers, which gives the best set of each size, the best nested family, and the
regret of each order. Each size along each order then gets its matched scale: factors for its
student layers that lower the KL further, where the architecture allows it (--match_scale False
leaves it out).

DIR receives order.json, with the best order found and the factors, and kl.png. patching.patch and
evaluate.evaluate take that file as --order. A search that was stopped resumes when the same command
runs again. Nothing is random: the same text and models give the same order.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from patching.arguments import CalibrationArguments, MeasuringArguments
from patching.cli.command_line import (
    CommandLineParser,
    check_one_process,
    print_search_step,
    run_command,
    user_errors,
)
from patching.files.outputs import check_writable, write_json

if TYPE_CHECKING:
    from patching.family import Family

ORDER_FILE_NAME = "order.json"
PLOT_FILE_NAME = "kl.png"


@dataclass
class OrdersArguments(CalibrationArguments, MeasuringArguments):
    _argument_group_name = "the search"

    save_directory: Path = field(kw_only=True, metadata={"help": "folder for the results"})
    beam: int = field(
        default=1,
        metadata={"help": "how many families the search keeps at each size"},
    )
    exact: bool = field(
        default=False, metadata={"help": "measure every set of layers, up to 32,768 sets"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self.check_calibration("orders are measured on text")
        if self.searches_order:
            problems.append(f"--order {self.order} is always searched here: leave it out")
        if self.beam < 1:
            problems.append(f"beam={self.beam}: choose 1 or more")
        if problems:
            raise ValueError("; ".join(problems))


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        check_one_process()
        parser = CommandLineParser(OrdersArguments, prog="patching.orders", description=__doc__)
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        folder = arguments.save_directory
        check_writable(folder)

        from patching.devices import usable_device
        from patching.files.plot import save_figure
        from patching.orders.findings import (
            best_order_text,
            findings,
            kl_figure,
            matched_scales,
            order_file,
            table,
            tried_orders,
        )
        from patching.orders.measurements import MEASURED_FILE_NAME, Measurements
        from patching.orders.search import all_sets

        device = usable_device(arguments.device)
        family = arguments.open_measured(device)
        if family.max_layers_to_patch < 2:
            raise ValueError(
                f"this student has {family.max_layers_to_patch} patchable layers: there is no size "
                "between it and the teacher to search"
            )
        if arguments.exact:
            all_sets(family.layer_map)  # raises if there are too many
        text = arguments.read_calibration()
        _ = family.tokenizer  # raises here, not after minutes, if it is missing
        matches = arguments.match_scale and can_match(family)
        measure = Measurements(family, text, folder / MEASURED_FILE_NAME)
    given = family.order if arguments.requested_order() not in (None, "last", "first") else None
    with user_errors((FloatingPointError,)):
        tried = tried_orders(measure, given, arguments.beam, arguments.exact, print_search_step)
    scales = matched_scales(measure, tried) if matches else None
    found = findings(measure, tried, scales)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(kl_figure(found), folder / PLOT_FILE_NAME)
    values = order_file(measure, found, scales, asdict(arguments))
    write_json(folder / ORDER_FILE_NAME, values)
    print(table(found))
    print(f"{folder / ORDER_FILE_NAME}: {best_order_text(found)}")


def can_match(family: Family) -> bool:
    """Whether the scale of a family can be matched. If not, one line says why."""
    from patching.running.rescaled import check_rescaling

    try:
        check_rescaling(family.configs["teacher"], family.parents.trust_remote_code)
    except ValueError as error:
        print(f"no matched scale: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    run_command(main, "the same command goes on from what it has measured")
