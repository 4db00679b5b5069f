"""After training: search the order of patching and the scale of each size, and save both with the
student.

The text is documents that are neither trained on nor held out, because sizes are compared on
held-out text later. Only the first rank searches, with the saved student. What goes wrong here is
said in one line and does not fail the run: `python -m patching.orders` can do it later.
"""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from patching.architectures.models import predicts_masked_tokens
from patching.blocks import LayerMap
from patching.checkpoints.origin import origin_of
from patching.cli.command_line import USER_ERRORS
from patching.family import Family
from patching.files.outputs import write_json
from patching.orders.findings import (
    best_order,
    best_order_text,
    findings,
    matched_scales,
    order_file,
    table,
    tried_orders,
)
from patching.orders.measurements import Measurements
from patching.orders.scales import BudgetSpent
from patching.orders.search import next_sets
from patching.patch_order import NAMED_ORDERS
from patching.recipe import Reference
from patching.running.calibration import Calibration
from patching.running.rescaled import check_rescaling
from patching.student_config import StudentConfig
from train.data import documents_set_aside
from train.data_args import DataArguments
from train.model_args import ModelArguments
from train.saving import (
    MEASURED_ORDER_FILE_NAME,
    ORDER_FILE_NAME,
    RUN_FILE_NAME,
    repository_of,
)
from train.student_card import write_student_card
from train.training_args import DistillationArguments

TOKENS_PER_DOCUMENT = 256
"""Tokens that are read of each document, as in KLPatch."""
SEARCHED = ("klpatch",)
POINTS_PER_SIZE = 5
"""Models measured for the scale of a size with one run of student layers, about."""


class Cost(NamedTuple):
    """About what a search takes."""

    num_models: int
    num_tokens: int

    def text(self, flops_per_token: int | None, flops_per_second: float | None) -> str:
        text = f"about {self.num_models:,} models on {self.num_tokens:,} tokens"
        if flops_per_token is None:
            return text
        flops = self.num_models * self.num_tokens * flops_per_token
        text = f"{text}, {flops:.3g} FLOPs"
        return f"{text}, {flops / flops_per_second:,.0f} s" if flops_per_second else text


def why_not(config: PreTrainedConfig, layer_map: LayerMap) -> str | None:
    """Return why there is no order to measure, None if there is one."""
    if predicts_masked_tokens(config):
        return f"a {config.model_type} model predicts masked tokens"
    if layer_map.max_layers_to_patch < 2:
        return "there is no size between student and teacher to order"
    return None


def cost_of_order(
    config: PreTrainedConfig, layer_map: LayerMap, num_documents: int, max_length: int, budget: int
) -> Cost:
    """Return about what measuring the order takes."""
    sizes = range(1, layer_map.max_layers_to_patch)
    steps = [layer_map.patched_layers(k - 1, "last") for k in sizes]
    num_searched = sum(len(next_sets(layer_map, step, layer_map.patchable)) for step in steps)
    num_models = 1 + 2 * len(sizes) + num_searched
    try:
        check_rescaling(config)
        num_models += (len(NAMED_ORDERS) + len(SEARCHED)) * POINTS_PER_SIZE * len(sizes)
    except ValueError:
        pass
    num_tokens = num_documents * min(max_length, TOKENS_PER_DOCUMENT)
    return Cost(min(num_models, budget), num_tokens)


def flops_per_second_of_rank(
    log_history: Sequence[Mapping[str, float]], num_ranks: int
) -> float | None:
    """Return how fast one rank was in the last logged steps, None if no line says so."""
    speeds = [line["flops_per_second"] for line in log_history if "flops_per_second" in line]
    return speeds[-1] / num_ranks if speeds else None


def measure_order(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationArguments,
    flops_per_second: float | None = None,
) -> None:
    """Measure the order of the student in `save_directory`, unless that is done already. Files
    appear when they are complete. `flops_per_second` are those of this rank in training.
    """
    folder = Path(args.save_directory)
    if (
        not data_args.measure_order
        or args.process_index != 0
        or (folder / ORDER_FILE_NAME).exists()
    ):
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        family = Family.from_pretrained(
            model_args.teacher_model_name_or_path,
            folder,
            match_scale=False,
            revision=model_args.revision,
            device=args.device,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=model_args.trust_remote_code,
        )
        reason = why_not(family.configs["teacher"], family.layer_map)
        texts = documents_set_aside(data_args, args.text_seed, data_args.num_set_aside)
        if reason is None and not texts:
            reason = "the text has no document to set aside for it"
        if reason is not None:
            print(f"the order is not measured: {reason}", flush=True)
            return
        text = _calibration(data_args, texts)
        cost = cost_of_order(
            family.configs["teacher"],
            family.layer_map,
            len(texts),
            data_args.max_length,
            args.order_budget,
        )
        flops_per_token = family.sizes()[len(family) // 2].flops_per_token
        print(
            f"measuring the order of patching on {text.name}: "
            f"{cost.text(flops_per_token, flops_per_second)} (--measure_order False leaves it out)",
            flush=True,
        )
        _search(family, text, folder, model_args, data_args, args)
    except (*USER_ERRORS, BudgetSpent, RuntimeError) as error:  # memory may run out too
        first_line = str(error).partition("\n")[0]
        print(
            f"the order could not be measured ({first_line}): the student is complete, and "
            "python -m patching.orders can measure it",
            flush=True,
        )


def _calibration(data_args: DataArguments, texts: list[Any]) -> Calibration:
    names = " and ".join(Path(source.name).name for source in data_args.sources)
    length = min(data_args.max_length, TOKENS_PER_DOCUMENT)
    return Calibration(f"{len(texts)} documents of {names} set aside from training", texts, length)


def _search(
    family: Family,
    text: Calibration,
    folder: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationArguments,
) -> None:
    measure = Measurements(family, text, folder / MEASURED_ORDER_FILE_NAME, args.order_budget)
    tried = tried_orders(measure, searches=SEARCHED)
    scales = None
    try:
        check_rescaling(family.configs["teacher"], model_args.trust_remote_code)
        scales = matched_scales(measure, tried)
    except ValueError as error:
        print(f"no matched scale: {error}", flush=True)
    found = findings(measure, tried, scales)
    best = best_order(found)
    order = best if best in NAMED_ORDERS else tuple(found["orders"][best]["order"])
    student_config = StudentConfig(family.layer_map, order, scales)
    flags = {"budget": args.order_budget, "documents": data_args.order_documents}
    _save(family, folder, student_config, args)
    write_json(folder / ORDER_FILE_NAME, order_file(measure, found, scales, flags))
    print(table(found))
    print(f"order of patching saved with the student: {best_order_text(found)}", flush=True)


def _save(
    family: Family, folder: Path, student_config: StudentConfig, args: DistillationArguments
) -> None:
    """Write the order where it is read by default, and where it is told: the card and run.json."""
    run: Mapping[str, Any] = json.loads((folder / RUN_FILE_NAME).read_text(encoding="utf-8"))
    student_config.save(folder)
    write_json(folder / RUN_FILE_NAME, {**run, "student": student_config.to_dict()})
    teacher = family.parents.references["teacher"]
    write_student_card(
        folder,
        repository_of(args),
        origin_of(Reference(*teacher), family.configs["teacher"]),
        family.configs["teacher"],
        student_config,
        run["arguments"] | {"steps": run["student_step"]},
        run["held_out"],
    )
