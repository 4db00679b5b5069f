"""What a command line asks to evaluate, checked from configs alone, before any weights load."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from evaluate.arguments import EvaluationArguments
from evaluate.baselines import BASELINES
from evaluate.report import short_names
from evaluate.result import read_results
from evaluate.seeds import Seeds
from evaluate.tasks import LoadedTasks, load_tasks
from evaluate.text_task import task_of_texts
from patching.architectures.distilbert import as_bert_config
from patching.architectures.models import predicts_masked_tokens
from patching.blocks import Order
from patching.checkpoints.fingerprint import TOKENIZER, fingerprint
from patching.checkpoints.tokenizers import read_tokenizer
from patching.cli.units import parse_sizes
from patching.family import Family
from patching.patch_order import NAMED_ORDERS
from patching.recipe import Reference
from patching.running.calibration import Calibration

MODELS = ("teacher", "student", "model")
"""Settings that identify models."""
SCALES = "scales"
"""The setting that says how student layers are rescaled."""
SHARED_SETTINGS = ("teacher", "dtype", "limit", "num_fewshot", "seed")
"""Settings that all results in a folder must agree on."""


class Compared(NamedTuple):
    """A model to evaluate alongside the family."""

    reference: Reference
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Plan:
    arguments: EvaluationArguments
    family: Family
    sizes: list[int]
    random_family: Family | None
    """The teacher with `--random_student`."""
    compared: dict[str, Compared]
    """Compared models by their series."""
    calibration: Calibration | None
    texts: list[str]
    """The documents of `--dataset`."""

    @classmethod
    def of(cls, arguments: EvaluationArguments, device: torch.device) -> "Plan":
        """Raises ValueError or OSError if something is missing or does not fit together."""
        family = arguments.open_measured(
            device,
            device_map=arguments.device_map,
            attn_implementation=arguments.attn_implementation,
        )
        _ = family.tokenizer  # a missing one is noticed here
        model_type = family.configs["teacher"].model_type
        if predicts_masked_tokens(family.configs["teacher"]) and not (
            arguments.dataset or arguments.tasks
        ):
            raise ValueError(
                f"a {model_type} predicts masked tokens: name text to evaluate it on with --dataset"
            )
        return cls(
            arguments,
            family,
            parse_sizes(arguments.num_layers_to_patch, family.max_layers_to_patch),
            second_family(family, arguments) if arguments.random_student else None,
            compared_models(arguments, family),
            arguments.read_calibration() if arguments.calibration else None,
            arguments.read_texts(arguments.limit) if arguments.dataset else [],
        )

    def with_order(self, order: Order) -> "Plan":
        """The same plan with the family patched in a searched order, and the random student's
        family too if it has the same layers.
        """
        other = self.random_family
        if other is not None and other.layer_map == self.family.layer_map:
            other = other.with_order(order)
        return dataclasses.replace(self, family=self.family.with_order(order), random_family=other)

    def tasks(self) -> tuple[LoadedTasks, str | None]:
        """The text and lm-eval's tasks, and a line for the user if texts had to be cut.

        Raises ValueError for an unknown task.
        """
        arguments, loaded, line = self.arguments, LoadedTasks({}, {}), None
        if arguments.task_names or not self.texts:
            loaded = load_tasks(
                arguments.task_names,
                arguments.include_path,
                arguments.trust_remote_code,
                Seeds(*arguments.seeds),
                arguments.values_of("metadata"),
            )
        if self.texts:
            name, config = arguments.text_name, self.family.configs["teacher"]
            task, line = task_of_texts(name, self.texts, self.family.tokenizer, config)
            text = {name: {"tasks": {name: task}, "groups": {}, "group_map": {}}}
            loaded = LoadedTasks(text | loaded.by_name, loaded.failures)
        return loaded, line

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """By series, what all scores in one folder must agree on. Everything else that scores come
        from is stored with each, see `evaluate.sources`.
        """
        arguments, family = self.arguments, self.family
        shared = {
            "teacher": family.parents.fingerprint("teacher"),
            "dtype": str(family.dtype).removeprefix("torch."),
            "limit": arguments.limit,
            "num_fewshot": arguments.num_fewshot,
            "seed": arguments.seeds,
        }
        settings = {}
        for series, of_series in (("family", family), ("random_student", self.random_family)):
            if of_series is not None:
                student, order = of_series.parents.fingerprint("student"), of_series.order
                settings[series] = shared | {"student": student, "order": order}
                settings[series][SCALES] = scales_of(of_series)
        unscaled = {name: value for name, value in settings["family"].items() if name != SCALES}
        for name, baseline in BASELINES.items():
            if not baseline.needs_text:
                settings[name] = unscaled
            elif self.calibration is not None:
                calibration = {"calibration": self.calibration.sha256}
                settings[name] = unscaled | calibration
        for series, model in self.compared.items():
            settings[series] = shared | {"model": fingerprint(model.reference)}
        return settings

    def check_settings(self) -> None:
        """Raise ValueError if scores in the folder were made with other settings than these.

        Scores of a series that this plan does not have must agree on the shared settings. Scores
        of earlier versions, which identified models in another way, need not agree on these.
        """
        folder = self.arguments.save_directory
        now = json.loads(json.dumps(self.settings))
        for name, result in read_results(folder).items():
            wanted = now.get(result.series) or {key: now["family"][key] for key in SHARED_SETTINGS}
            for task in result.tasks:
                before = result.settings_of(task)
                if before:  # earlier versions rescaled nothing
                    before = {SCALES: None} | before
                not_comparable = MODELS if result.is_unverified(task) else ()
                for key in wanted.keys() & before.keys() - {*not_comparable}:
                    if before[key] != wanted[key]:
                        raise ValueError(
                            f"{folder / name}.json was made with {key}={before[key]} and "
                            f"{wanted[key]} is asked for now: choose another --save_directory, or "
                            "the same settings"
                        )


def scales_of(family: Family) -> str | None:
    """A short text that differs for other factors of the family's sizes, None if it has none."""
    if family.scales is None:
        return None
    factors = [
        sorted(family.scales.factors(family.patched_layers(k)).items()) for k in range(len(family))
    ]
    if not any(factors):
        return None
    return f"matched {hashlib.sha256(json.dumps(factors).encode()).hexdigest()[:12]}"


def second_family(family: Family, arguments: EvaluationArguments) -> Family:
    """The family of the same teacher and `--random_student`.

    It has the order of the first family if it has the same layers. An order from a file or a search
    does not apply to other layers.
    """
    other = dataclasses.replace(
        arguments,
        student_model_name_or_path=arguments.random_student,
        student_revision=arguments.random_student_revision,
        order=arguments.order if arguments.order in NAMED_ORDERS else None,
    ).open_family(
        dtype=family.dtype,
        device=family.parents.device,
        device_map=arguments.device_map,
        attn_implementation=arguments.attn_implementation,
    )
    return other.with_order(family.order) if other.layer_map == family.layer_map else other


def compared_models(arguments: EvaluationArguments, family: Family) -> dict[str, Compared]:
    """The models that `--compare` names, by series. A folder of models names each of them.

    Raises ValueError for a model that cannot be read, and if a perplexity is asked for on other
    tokens than the teacher's.
    """
    names: list[str] = []
    for name in arguments.compare:
        folder = Path(name)
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        if folder.is_dir() and not (folder / "config.json").is_file():
            if not inside:
                raise ValueError(f"compare={name}: there is no model in this folder")
            names += map(str, inside)
        else:
            names.append(name)
    names = list(dict.fromkeys(names))
    trust = arguments.trust_remote_code
    compared = {}
    tokenizers: dict[tuple[Any, ...], PreTrainedTokenizerBase] = {}
    for short, name in zip(short_names(names), names):
        reference = reference_of(name)
        how = {"revision": reference.revision, "trust_remote_code": trust}
        try:
            config = AutoConfig.from_pretrained(reference.name_or_path, **how)
            # Models of one kind share one, which takes 100 MB if the vocabulary is large.
            files = fingerprint(reference, TOKENIZER).split()[-1]
            kind = (files, config.model_type, config.get_text_config().vocab_size)
            if kind not in tokenizers:
                # Batched generation needs padding on the left.
                tokenizers[kind] = read_tokenizer(reference, config, trust, padding_side="left")
            tokenizer = tokenizers[kind]
        except (OSError, HTTPError, ValueError) as error:
            raise ValueError(f"compare={name}: the model cannot be read ({error})") from error
        if arguments.dataset and tokenizer.get_vocab() != family.tokenizer.get_vocab():
            raise ValueError(
                f"compare={name}: its tokens differ from the teacher's, so its perplexity cannot "
                "be compared with the family's: leave out --dataset, or this model"
            )
        compared[f"compare_{short}"] = Compared(reference, as_bert_config(config), tokenizer)
    return compared


def reference_of(name: str) -> Reference:
    """A model's name, with its revision if it is written MODEL@REVISION."""
    name_or_path, at, revision = name.rpartition("@")
    if not at or Path(name).exists():
        return Reference(name)
    return Reference(name_or_path, revision)
