"""Which kind of language model an architecture is: the one place that chooses the class to load or
build it with.
"""

import pickle
from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from patching.architectures.distilbert import as_bert
from patching.recipe import Reference


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The config's language model on the meta device."""
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


MASKED_LANGUAGE_MODELS = frozenset({"bert", "distilbert", "roberta"})
"""Encoders by `config.model_type`: they predict masked tokens, where all others predict the
next.
"""


def predicts_masked_tokens(config: PreTrainedConfig) -> bool:
    return config.model_type in MASKED_LANGUAGE_MODELS


def auto_class(
    config: PreTrainedConfig,
) -> type[AutoModelForCausalLM] | type[AutoModelForMaskedLM]:
    """transformers' class for a config's language model."""
    return AutoModelForMaskedLM if predicts_masked_tokens(config) else AutoModelForCausalLM


def load_model(
    reference: Reference,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A model with its weights, never from a pickle that could run code; `auto` is the dtype they
    are stored in. A DistilBERT becomes a BERT.

    transformers fills gaps with random numbers and a warning; here they are a ValueError, as are
    damaged files.
    """
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
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{reference.name_or_path}: its weights cannot be read ({error}); download or save "
            "them again"
        ) from error
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{reference.name_or_path}: {name} has shape {list(stored)} in the weights and "
            f"{list(expected)} by the config"
        )
    if found["missing_keys"]:
        raise ValueError(
            f"{reference.name_or_path}: its weights lack "
            f"{', '.join(sorted(found['missing_keys'])[:3])}"
        )
    return as_bert(model)
