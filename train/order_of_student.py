"""After training: search the order of patching and the scale of each size, and save both with the
student.

The text is documents that are neither trained on nor held out, because sizes are compared on
held-out text later. Only the first rank searches, with the saved student. What goes wrong here is
said in one line and does not fail the run: `python -m patching.orders` can do it later.
"""

import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from patching.running.calibration import Calibration
from patching.running.documents import attention_of_whole_texts
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
from train.student_card import training_facts, write_student_card
from train.training_args import DistillationArguments, measuring_dtype

TOKENS_PER_DOCUMENT = 256
"""Tokens that are read of each document, as in KLPatch."""
SEARCHED = ("klpatch",)
POINTS_PER_SIZE = 5
"""Models measured for the scale of a size with one run of student layers, about."""


MOST_MODELS = 1000
"""Models to measure at most, unless --order_budget says otherwise."""


class Cost(NamedTuple):
    """About what a search takes."""

    num_models: int
    num_tokens: int
    """Tokens that each model reads."""
    flops_per_token: int | None

    @property
    def flops_per_model(self) -> int | None:
        return None if self.flops_per_token is None else self.num_tokens * self.flops_per_token

    def budget(self, given: int | None, training_flops: float | None) -> int:
        """Return the most models that may be measured: those given, else as many as take the FLOPs
        of the training.
        """
        if given is not None:
            return given
        if not training_flops or not self.flops_per_model:
            return MOST_MODELS
        return min(MOST_MODELS, int(training_flops // self.flops_per_model))

    def within(self, given: int | None, training_flops: float | None) -> "Cost":
        """Return what is left of it in the budget."""
        budget = self.budget(given, training_flops)
        return self._replace(num_models=min(self.num_models, budget))

    def text(self, flops_per_second: float | None = None) -> str:
        models = "model" if self.num_models == 1 else "models"
        text = f"about {self.num_models:,} {models} on {self.num_tokens:,} tokens"
        if self.flops_per_model is None:
            return text
        flops = self.num_models * self.flops_per_model
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
    config: PreTrainedConfig,
    layer_map: LayerMap,
    num_documents: int,
    max_length: int,
    flops_per_token: int | None,
) -> Cost:
    """Return about what measuring the order takes. `flops_per_token` are those of a model between
    student and teacher.
    """
    sizes = range(1, layer_map.max_layers_to_patch)
    steps = [layer_map.patched_layers(k - 1, "last") for k in sizes]
    num_searched = sum(len(next_sets(layer_map, step, layer_map.patchable)) for step in steps)
    num_models = 1 + 2 * len(sizes) + num_searched
    with suppress(ValueError):  # of architectures whose scale cannot be matched
        check_rescaling(config)
        num_models += (len(NAMED_ORDERS) + len(SEARCHED)) * POINTS_PER_SIZE * len(sizes)
    num_tokens = num_documents * min(max_length, TOKENS_PER_DOCUMENT)
    return Cost(num_models, num_tokens, flops_per_token)


def last_logged(log: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Return the last value of a field in a run's log, None if no line has it."""
    return next((line[name] for line in reversed(log) if name in line), None)


def measure_order(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationArguments,
) -> None:
    """Measure the order of the student in `save_directory`, unless that is done already. Files
    appear when they are complete.
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
            dtype=measuring_dtype(args),
            device=args.device,
            attn_implementation=attention_of_whole_texts(model_args.attn_implementation),
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
            family.sizes()[len(family) // 2].flops_per_token,
        )
        log = _read_run(folder)["log"]
        training_flops = last_logged(log, "total_flos")
        budget = cost.budget(args.order_budget, training_flops)
        speed = last_logged(log, "flops_per_second")
        within = cost.within(args.order_budget, training_flops)
        said = within.text(speed and speed / args.world_size)
        print(
            f"measuring the order of patching on {text.name}: {said} (--measure_order False "
            "leaves it out)",
            flush=True,
        )
        _search(family, text, folder, args, budget)
    except (*USER_ERRORS, BudgetSpent, RuntimeError) as error:  # memory may run out too
        first_line = str(error).partition("\n")[0]
        if isinstance(error, BudgetSpent):
            first_line += ", which --order_budget changes"
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
    args: DistillationArguments,
    budget: int,
) -> None:
    measure = Measurements(family, text, folder / MEASURED_ORDER_FILE_NAME, budget)
    tried = tried_orders(measure, searches=SEARCHED)
    scales = None
    try:
        check_rescaling(family.configs["teacher"], family.parents.trust_remote_code)
        scales = matched_scales(measure, tried)
    except ValueError as error:
        print(f"no matched scale: {error}", flush=True)
    found = findings(measure, tried, scales)
    best = best_order(found)
    order = best if best in NAMED_ORDERS else tuple(found["orders"][best]["order"])
    student_config = StudentConfig(family.layer_map, order, scales)
    flags = {"budget": budget, "documents": len(text.texts)}
    _save(family, folder, student_config, args)
    write_json(folder / ORDER_FILE_NAME, order_file(measure, found, scales, flags))
    print(table(found))
    print(f"order of patching saved with the student: {best_order_text(found)}", flush=True)


def _read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RUN_FILE_NAME).read_text(encoding="utf-8"))


def _save(
    family: Family, folder: Path, student_config: StudentConfig, args: DistillationArguments
) -> None:
    """Write the order where it is read by default, and where it is told: the card and run.json."""
    run = _read_run(folder)
    student_config.save(folder)
    write_json(folder / RUN_FILE_NAME, {**run, "student": student_config.to_dict()})
    write_student_card(
        folder,
        repository_of(args),
        origin_of(family.parents.references["teacher"]),
        family.configs["teacher"],
        student_config,
        training_facts(run),
        run["held_out"],
    )
