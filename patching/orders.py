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

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from patching.auto_class import predicts_masked_tokens
from patching.block_influence import block_influence
from patching.blocks import LayerMap, as_layer_list
from patching.command_line import CommandLineParser, check_one_process, user_errors
from patching.divergence import check_logits_are_the_heads
from patching.layout import layout_of
from patching.named_orders import SEARCHED_ORDERS
from patching.order_search import PatchedLayers, all_sets, as_order, search
from patching.outputs import check_writable, environment, write_json
from patching.pair import MeasuringArguments, Pair, usable_device
from patching.plot import plot_lines, save_figure
from patching.recipe import Parent, patched_model
from patching.sizes import size_of
from patching.teacher_kl import TeacherKL
from patching.texts import Calibration, CalibrationArguments

ORDER_FILE_NAME = "order.json"
MEASURED_FILE_NAME = "order_kl.json"
PLOT_FILE_NAME = "kl.png"

SETS_PER_TREE = 64
"""Sets whose models are measured together: what they share is run once, what they give is kept."""


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


Load = Callable[[], Mapping[Parent, PreTrainedModel]]


class Measurements:
    """The KL of every set of patched layers measured so far, and the teacher's block influences.

    With a `path` they are kept in a file, written after every tree of models, and taken from it;
    weights are loaded when something is missing.

    Raises ValueError for a file that was made of other models, text or dtype, and for models that
    cap or scale their logits.
    """

    def __init__(
        self,
        pair: Pair,
        text: Calibration,
        dtype: torch.dtype,
        load: Load,
        path: Path | None = None,
    ) -> None:
        self.pair, self.text, self.load, self.path = pair, text, load, path
        self.kl: dict[PatchedLayers, float] = {}
        self._influences: list[float] | None = None
        for config in pair.configs.values():
            check_logits_are_the_heads(config)
            if predicts_masked_tokens(config):
                raise ValueError(
                    f"orders are searched for models that predict the next token, not for "
                    f"{config.model_type}: choose --order last, first or a file"
                )
        self.settings = pair.identity | {
            "dtype": str(dtype).removeprefix("torch."),
            "text": text.name,
            "text_sha256": text.sha256,
        }
        if path is not None and path.is_file():
            self._read(path)

    @cached_property
    def models(self) -> Mapping[Parent, PreTrainedModel]:
        return self.load()

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return self.text.batches(self.pair.tokenizer, self.pair.configs["teacher"])

    @cached_property
    def teacher_kl(self) -> TeacherKL:
        return TeacherKL(**self.models, batches=self.batches)

    def __call__(self, sets: Collection[PatchedLayers]) -> Mapping[PatchedLayers, float]:
        layer_map = self.pair.layer_map
        layers = range(len(layer_map.kept))
        # Neighbours in this sequence share the longest prefixes.
        missing = sorted(
            set(sets) - self.kl.keys(), key=lambda patched: [i in patched for i in layers]
        )
        starts = range(0, len(missing), SETS_PER_TREE)
        for start in tqdm(starts, desc="trees of models", disable=len(starts) < 2):
            group = missing[start : start + SETS_PER_TREE]
            names = {patched: as_layer_list(sorted(patched)) for patched in group}
            found = self.teacher_kl.of(
                {name: patched_model(layer_map, patched) for patched, name in names.items()},
                remember=len(missing) <= SETS_PER_TREE,
            )
            self.kl |= {patched: found[name] for patched, name in names.items()}
            self._write()
        return self.kl

    @property
    def influences(self) -> list[float]:
        """Of the teacher's layers."""
        if self._influences is None:
            self._influences = block_influence(self.models["teacher"], self.batches)
            self._write()
        return self._influences

    def _write(self) -> None:
        if self.path is None:
            return
        kl = {as_layer_list(sorted(patched)): value for patched, value in self.kl.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path, {"settings": self.settings, "block_influence": self._influences, "kl": kl}
        )

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, kl, influences = stored["settings"], stored["kl"], stored["block_influence"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it") from error
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path} was measured with {name}={before.get(name)} and {value} is asked for "
                    "now: choose another folder, or the same settings"
                )
        self._influences = influences
        self.kl = {
            frozenset(map(int, filter(None, layers.split(",")))): value
            for layers, value in kl.items()
        }


def most_restored_first(layer_map: LayerMap, influences: Sequence[float]) -> list[int]:
    """Patchable layers by the summed influence of the teacher layers that patching puts back."""
    return sorted(
        layer_map.patchable,
        key=lambda i: (-sum(influences[layer] for layer in layer_map.blocks[i][1:]), i),
    )


def searched_sets(
    name: str, measure: Measurements, beam: int | None = 1
) -> tuple[PatchedLayers, ...]:
    """The sets of a searched order, sizes 1 to max - 1."""
    layer_map = measure.pair.layer_map
    sequence = None
    if name == "block-influence":
        sequence = most_restored_first(layer_map, measure.influences)

    def report(k: int, patched: PatchedLayers, kl: float) -> None:
        layers = as_layer_list(sorted(patched))
        print(f"{name}, k = {k}: patched {layers}, KL {kl:.4f}", file=sys.stderr, flush=True)

    return search(layer_map, measure, beam, sequence, report)


def calibration_of(arguments: Any) -> Calibration | None:
    """The text that `--order` is searched on, None where it is not searched.

    Raises ValueError or OSError where there is none.
    """
    if arguments.order not in SEARCHED_ORDERS:
        return None
    if problems := arguments.check_calibration(f"--order {arguments.order} is measured on text"):
        raise ValueError("; ".join(problems))
    return Calibration.read(arguments)


def searched_order(measure: Measurements) -> tuple[int, ...]:
    """The order that the pair's own flags ask to search."""
    sets = searched_sets(measure.pair.arguments.order, measure)
    return as_order(measure.pair.layer_map, sets)


def tried_orders(
    measure: Measurements, arguments: OrdersArguments
) -> dict[str, tuple[PatchedLayers, ...]]:
    """By name the sets of all orders, sizes 1 to max - 1."""
    pair, layer_map = measure.pair, measure.pair.layer_map
    named = {"last": "last", "first": "first"}
    if arguments.requested_order() not in (None, "last", "first"):
        named["given"] = pair.order
    sizes = range(1, layer_map.max_layers_to_patch)
    tried = {
        name: tuple(layer_map.patched_layers(k, order) for k in sizes)
        for name, order in named.items()
    }
    student = frozenset()
    measure({student, *(patched for sets in tried.values() for patched in sets)})
    for name in ("block-influence", "klpatch"):
        tried[name] = searched_sets(name, measure)
    if arguments.beam > 1:
        name = f"beam {arguments.beam}"
        tried[name] = searched_sets(name, measure, arguments.beam)
    if arguments.exact:
        measure(all_sets(layer_map))
        tried["exact"] = searched_sets("exact", measure, None)
    return tried


def findings(
    measure: Measurements,
    tried: Mapping[str, tuple[PatchedLayers, ...]],
    is_exact: bool,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What order.json holds of the orders: sizes with their KL, areas, regrets.

    `mean_kl` is the mean over the sizes between student and teacher, which a search makes small;
    `area` the mean along the axis of parameters from student to teacher. Regret is how much higher
    the mean is than that of the best nested family, and than that of the best set of each size,
    nested or not.
    """
    pair, layer_map = measure.pair, measure.pair.layer_map
    everything = frozenset(range(len(layer_map.kept)))
    layouts = {
        parent: layout_of(config, torch.float32, trust_remote_code)
        for parent, config in pair.configs.items()
    }

    def member(k: int, patched: PatchedLayers) -> dict[str, Any]:
        size = size_of(patched_model(layer_map, patched), layouts, torch.float32, sys.maxsize)
        return {
            "num_layers_to_patch": k,
            "patched_layers": sorted(patched),
            "layers": size.depth,
            "parameters": size.parameters._asdict(),
            "kl": 0.0 if patched == everything else measure.kl[patched],
        }

    def mean(sets: Sequence[PatchedLayers]) -> float:
        return sum(measure.kl[patched] for patched in sets) / len(sets)

    found: dict[str, Any] = {"orders": {}}
    best_sets: list[PatchedLayers] = []
    if is_exact:
        by_size: dict[int, list[PatchedLayers]] = {}
        for patched in all_sets(layer_map):
            by_size.setdefault(layer_map.num_patched(patched), []).append(patched)
        best_sets = [min(by_size[k], key=lambda s: (measure.kl[s], sorted(s))) for k in by_size]
        found["best_sets"] = [member(k, patched) for k, patched in enumerate(best_sets, start=1)]
        found["num_sets"] = sum(map(len, by_size.values()))
    for name, sets in tried.items():
        members = [member(k, patched) for k, patched in enumerate([frozenset(), *sets, everything])]
        result = {
            "order": as_order(layer_map, sets),
            "mean_kl": mean(sets),
            "area": _area(members),
            "members": members,
        }
        if is_exact:
            result["regret"] = mean(sets) - mean(tried["exact"])
            result["regret_of_best_sets"] = mean(sets) - mean(best_sets)
        found["orders"][name] = result
    return found


def _area(members: Sequence[Mapping[str, Any]]) -> float:
    points = [(member["parameters"]["both_counted"], member["kl"]) for member in members]
    total = sum((right - left) * (a + b) / 2 for (left, a), (right, b) in pairwise(points))
    return total / (points[-1][0] - points[0][0])


def table(found: Mapping[str, Any]) -> str:
    """The orders as Markdown: KL of each size, means, regrets."""
    sizes = len(next(iter(found["orders"].values()))["members"])
    is_exact = "best_sets" in found
    header = ["order", "layers", *(f"k = {k}" for k in range(sizes)), "mean", "area"]
    header += ["regret", "regret to best sets"] if is_exact else []
    rows = []
    for name, result in found["orders"].items():
        cells = [name, as_layer_list(result["order"])]
        numbers = [member["kl"] for member in result["members"]]
        numbers += [result["mean_kl"], result["area"]]
        numbers += [result["regret"], result["regret_of_best_sets"]] if is_exact else []
        rows.append([*cells, *(f"{number:.4f}" for number in numbers)])
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kl_figure(found: Mapping[str, Any]):
    """KL against parameters, a line for each order."""
    lines = {
        name: [(m["parameters"]["both_counted"] / 1e6, m["kl"]) for m in result["members"]]
        for name, result in found["orders"].items()
    }
    return plot_lines(lines, "parameters (millions)", "KL(teacher || model), nats per token")


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        check_one_process()
        parser = CommandLineParser(OrdersArguments, prog="patching.orders", description=__doc__)
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        folder = arguments.save_directory
        check_writable(folder)
        pair = Pair.from_pretrained(arguments)
        if pair.layer_map.max_layers_to_patch < 2:
            raise ValueError(
                f"this student has {pair.layer_map.max_layers_to_patch} patchable layers: there "
                "is no size between it and the teacher to search"
            )
        if arguments.exact:
            all_sets(pair.layer_map)
        device, dtype = usable_device(arguments.device), pair.dtype(arguments.dtype)
        text = Calibration.read(arguments)
        _ = pair.tokenizer  # one that is missing is noticed here
        measure = Measurements(
            pair,
            text,
            dtype,
            lambda: pair.load(["teacher", "student"], dtype, device),
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
