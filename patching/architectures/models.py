"""Build a model from its config, without weights, or load it: the one place that chooses between
causal and masked language models.
"""

import pickle
from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from patching.architectures.distilbert import as_bert
from patching.architectures.table import ARCHITECTURES
from patching.files.model_files import fault_of_pickles, pickled_files, weights_files
from patching.recipe import Reference


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the config's language model on the meta device."""
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def predicts_masked_tokens(config: PreTrainedConfig) -> bool:
    """Return whether a model predicts masked tokens. All others predict the next token."""
    # The table has no row for DistilBERT, which becomes a BERT when it is loaded.
    model_type = "bert" if config.model_type == "distilbert" else config.model_type
    return model_type in ARCHITECTURES and ARCHITECTURES[model_type].predicts_masked_tokens


def auto_class(
    config: PreTrainedConfig,
) -> type[AutoModelForCausalLM] | type[AutoModelForMaskedLM] | type[AutoModelForImageTextToText]:
    """Return transformers' class that builds and loads the config's model."""
    if predicts_masked_tokens(config):
        return AutoModelForMaskedLM
    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Return whether the config is of a multimodal model, whose text tower is patched."""
    model_type = config.model_type
    return model_type in ARCHITECTURES and bool(ARCHITECTURES[model_type].carried)


def _fault_of(reference: Reference) -> ValueError | None:
    return fault_of_pickles(pickled_files(reference))


def load_model(
    reference: Reference,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a model with its weights. `dtype` "auto" is the dtype they are stored in. A DistilBERT
    becomes a BERT. Pickles that could run code are never loaded.

    Raises ValueError if files are damaged or tensors are missing, which transformers would fill
    with random numbers and a warning.
    """
    if weights_files(reference) is None:  # raises for an index that names files elsewhere
        pickled_files(reference)
    try:
        config = AutoConfig.from_pretrained(
            reference.name_or_path,
            revision=reference.revision,
            trust_remote_code=trust_remote_code,
        )
        model, found = auto_class(config).from_pretrained(
            reference.name_or_path,
            revision=reference.revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=device_map,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        fault = None if isinstance(error, SafetensorError) else _fault_of(reference)
        if fault is None and isinstance(error, RuntimeError):  # memory ran out, for example
            raise
        reason = "a file holds more than tensors, which is never run"
        raise fault or ValueError(
            f"{reference.name_or_path}: its weights cannot be read "
            f"({error if isinstance(error, SafetensorError) else reason}); download or save them "
            "again"
        ) from error
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{reference.name_or_path}: {name} has shape {list(stored)} in the weights and "
            f"{list(expected)} in the config"
        )
    if found["missing_keys"]:
        raise ValueError(
            f"{reference.name_or_path}: its weights lack "
            f"{', '.join(sorted(found['missing_keys'])[:3])}"
        )
    return as_bert(model)
