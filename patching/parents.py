"""Teacher and student, by name or in memory. Weights are loaded when they are first needed."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from patching.architectures.distilbert import as_bert
from patching.architectures.lookup import architecture_of, read_config
from patching.architectures.models import load_model, predicts_masked_tokens
from patching.checkpoints.fingerprint import WEIGHTS, fingerprint
from patching.checkpoints.generation_settings import (
    check_settings,
    implied_settings,
    member_settings,
    own_settings,
)
from patching.checkpoints.stored_dtype import stored_dtype
from patching.checkpoints.tokenizers import read_tokenizer
from patching.files.model_files import read_json
from patching.recipe import Parent, Reference
from patching.running.varlen import VARLEN

Found = TypeVar("Found")

Model = str | os.PathLike[str] | PreTrainedModel
"""A folder, a hub repository, or a model in memory."""


@dataclass(frozen=True)
class Parents:
    """Teacher and student: their configs, the models in memory, and how the others are loaded."""

    references: dict[Parent, Reference]
    """Where each parent came from. The name is empty for a model in memory that does not say."""
    configs: dict[Parent, PreTrainedConfig]
    dtype: torch.dtype
    device: torch.device
    device_map: str | Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    models: dict[Parent, PreTrainedModel] = field(default_factory=dict)
    """Parents in memory: those the caller gave, and those that `load` has read since."""
    given: frozenset[Parent] = frozenset()
    """Parents that the caller gave as models, which `release` leaves alone."""

    @classmethod
    def from_pretrained(
        cls,
        parents: Mapping[Parent, Model],
        revisions: Mapping[Parent, str | None],
        dtype: torch.dtype | str,
        device: str | torch.device | None,
        device_map: str | Mapping[str, Any] | None,
        attn_implementation: str | None,
        trust_remote_code: bool,
    ) -> "Parents":
        """Read both configs; arguments and errors are those of `Family.from_pretrained`."""
        if attn_implementation == VARLEN:
            raise ValueError(
                f"attn_implementation={VARLEN}: it is for training on packed rows, choose sdpa or "
                "leave it out"
            )
        models = {
            parent: as_bert(plain_model(parent, model))
            for parent, model in parents.items()
            if isinstance(model, nn.Module)
        }
        references = {
            parent: Reference(_name_of(model), revisions[parent])
            for parent, model in parents.items()
        }
        configs = {
            parent: _config_of(parent, references[parent], models.get(parent), trust_remote_code)
            for parent in parents
        }
        return cls(
            references,
            configs,
            _dtype_of(dtype, references["teacher"], configs["teacher"], models.get("teacher")),
            _device_of(device, models),
            device_map,
            attn_implementation,
            trust_remote_code,
            models,
            frozenset(models),
        )

    @property
    def placement(self) -> str | Mapping[str, Any]:
        """Where weights go as they are read: what the caller said, else all to one device."""
        return self.device_map or {"": self.device}

    def load(self, parents: Collection[Parent]) -> dict[Parent, PreTrainedModel]:
        """The named parents, all in one dtype. Each is read once and kept.

        Raises ValueError if weights are damaged or incomplete, or if a model given in memory has
        another dtype.
        """
        for parent in sorted(parents):
            if parent not in self.models:
                self.models[parent] = load_model(
                    self.references[parent],
                    self.dtype,
                    self.trust_remote_code,
                    self.attn_implementation,
                    self.placement,
                )
            elif self.models[parent].dtype != self.dtype:
                raise ValueError(
                    f"the {parent} is in memory in {self.models[parent].dtype}, and {self.dtype} "
                    "is asked for: load both models in one dtype"
                )
        return {parent: self.models[parent] for parent in sorted(parents)}

    def release(self, *parents: Parent) -> None:
        """Let go of weights that `load` has read, of both parents unless some are named. Models
        given in memory stay.
        """
        for parent in set(parents or self.models) - self.given:
            self.models.pop(parent, None)

    def fingerprint(self, parent: Parent, patterns: Iterable[str] = WEIGHTS) -> str:
        """What tells a parent's weights, or its files that match `patterns`, from others at the
        same place.
        """
        return fingerprint(self.references[parent], patterns)

    def find(self, parent: Parent, read: Callable[[Reference], Found]) -> Found | None:
        """Return what `read` finds where a parent came from. A model in memory may not be there any
        more, which gives None.

        Raises OSError if another parent cannot be reached.
        """
        try:
            return read(self.references[parent])
        except OSError:
            if parent in self.given:
                return None
            raise

    @cached_property
    def generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json for the family's members, None if the teacher has
        no such file and the student nothing to add.
        """
        own = {}
        for parent in self.configs:
            model = self.models[parent] if parent in self.given else None
            stored = self.find(parent, lambda where: read_json(where, "generation_config.json"))
            if stored is not None:
                check_settings(parent, stored)
            own[parent] = own_settings(stored, model)
        config = self.find("teacher", lambda where: read_json(where, "config.json"))
        implied = implied_settings(config or self.configs["teacher"].to_dict())
        return member_settings(own["teacher"], implied, own.get("student"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer with a padding token. It pads on the left, as batched generation
        needs, unless the family is of encoders.

        Raises ValueError for a teacher in memory that does not say where it came from.
        """
        reference, config = self.references["teacher"], self.configs["teacher"]
        if not reference.name_or_path:
            raise ValueError(
                "the teacher in memory does not say where it came from: give its tokenizer too"
            )
        side = {} if predicts_masked_tokens(config) else {"padding_side": "left"}
        tokenizer = read_tokenizer(reference, config, self.trust_remote_code, **side)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def plain_model(parent: Parent, model: nn.Module) -> PreTrainedModel:
    """The model as given. Raises ValueError for one that is wrapped, sharded or has adapters."""
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"the {parent} has PEFT adapters: merge them first, or call delete_adapter"
            )
        if kind.startswith("FSDP"):
            raise ValueError(f"the {parent} is sharded ({kind}): save it and name the folder")
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"the {parent} is a {kind}, which has no language modeling head: load it with "
                "AutoModelForCausalLM, or AutoModelForMaskedLM for an encoder"
            )
        return model
    remedies = {
        "OptimizedModule": "give the model that torch.compile was called on",
        "DistributedDataParallel": "give its .module",
    }
    remedy = remedies.get(kind, "give the PreTrainedModel inside it")
    if "Peft" in kind:
        remedy = "give its merge_and_unload()"
    raise ValueError(f"the {parent} is a {kind}, not a transformers model: {remedy}")


def _name_of(model: Model) -> str:
    return model.name_or_path if isinstance(model, PreTrainedModel) else os.fspath(model)


def _config_of(
    parent: Parent,
    reference: Reference,
    model: PreTrainedModel | None,
    trust_remote_code: bool,
) -> PreTrainedConfig:
    if model is None:
        return read_config(f"{parent}_model_name_or_path", *reference, trust_remote_code)
    architecture_of(model.config, trust_remote_code)  # raises for one that is not supported
    return model.config


def _dtype_of(
    name: str | torch.dtype,
    teacher: Reference,
    config: PreTrainedConfig,
    in_memory: PreTrainedModel | None,
) -> torch.dtype:
    """`auto` is the teacher's dtype: that of its stored tensors if its config names none."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        if in_memory is not None:
            return in_memory.dtype
        return config.dtype or stored_dtype(teacher) or torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name}: choose auto, bfloat16, float16 or float32")
    return dtype


def _device_of(
    device: str | torch.device | None, models: Mapping[Parent, PreTrainedModel]
) -> torch.device:
    """The device asked for, else that of the models in memory, else the CPU."""
    places = {model.device for model in models.values()}
    if device is not None:
        places.add(torch.empty(0, device=device).device)
    if len(places) > 1:
        raise ValueError(
            f"teacher and student are on {' and '.join(sorted(map(str, places)))}: move both to "
            "one device"
        )
    return places.pop() if places else torch.device("cpu")
