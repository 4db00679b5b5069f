"""Which layers to patch first: orders searched by measurement, and how far each is from the best.

    python -m patching.orders --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --calibration TEXT --save_directory DIR

measures the sizes of several orders by their mean KL(teacher || model) per token of the calibration
text: `last`, `first`, `block-influence` (patched first is what puts back the teacher layers of most
influence) and `klpatch` (at each size the set of lowest KL). --beam widens the search, --exact
measures every set, so that the best set of each size, the best nested family and each order's
regret are known. DIR receives order.json (`order` is the best of those tried; patching.patch and
evaluate.evaluate take the file as --order) and kl.png. A search that was stopped goes on where it
was when it is started again. Nothing is random: the same text and models give the same order.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from patching.arguments import CalibrationArguments, MeasuringArguments
from patching.cli.command_line import CommandLineParser, check_one_process, user_errors
from patching.family import Family, usable_device
from patching.files.outputs import check_writable, environment, write_json
from patching.files.plot import save_figure
from patching.orders.findings import findings, kl_figure, table, tried_orders
from patching.orders.measurements import MEASURED_FILE_NAME, Measurements
from patching.orders.search import all_sets
from patching.patch_order import SEARCHED_ORDERS
from patching.running.calibration import Calibration

ORDER_FILE_NAME = "order.json"
PLOT_FILE_NAME = "kl.png"


@dataclass
class OrdersArguments(CalibrationArguments, MeasuringArguments):
    save_directory: Path = field(kw_only=True, metadata={"help": "folder for what is found"})
    beam: int = field(
        default=1,
        metadata={"help": "families that a search goes on with at each size"},
    )
    exact: bool = field(
        default=False, metadata={"help": "measure every set, for up to 12 patchable layers"}
    )

    def __post_init__(self) -> None:
        problems = self.check_calibration("orders are measured on text")
        if self.order in SEARCHED_ORDERS:
            problems.append(f"--order {self.order} is searched here in any case: leave it out")
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
        family = Family.from_pretrained(arguments)
        if family.layer_map.max_layers_to_patch < 2:
            raise ValueError(
                f"this student has {family.layer_map.max_layers_to_patch} patchable layers: there "
                "is no size between it and the teacher to search"
            )
        if arguments.exact:
            all_sets(family.layer_map)
        device, dtype = usable_device(arguments.device), family.dtype(arguments.dtype)
        text = Calibration.read(arguments)
        _ = family.tokenizer  # one that is missing is noticed here
        measure = Measurements(
            family,
            text,
            dtype,
            lambda: family.load(["teacher", "student"], dtype, device),
            folder / MEASURED_FILE_NAME,
        )
    tried = tried_orders(measure, arguments)
    found = findings(measure, tried, arguments.exact, arguments.trust_remote_code)
    best = min(found["orders"], key=lambda name: found["orders"][name]["mean_kl"])
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(kl_figure(found), folder / PLOT_FILE_NAME)
    write_json(
        folder / ORDER_FILE_NAME,
        {
            "order": found["orders"][best]["order"],
            "name": best,
            **found,
            "settings": measure.settings,
            "arguments": asdict(arguments),
            "environment": environment(),
        },
    )
    print(table(found))
    print(f"{folder / ORDER_FILE_NAME}: {best}, mean KL {found['orders'][best]['mean_kl']:.4f}")


if __name__ == "__main__":
    main()
