"""Find the architecture of a config: its row in the table, or one that transformers declares."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from patching.architectures.config import config_for, depth_field
from patching.architectures.distilbert import as_bert_config
from patching.architectures.models import empty_model, predicts_masked_tokens
from patching.architectures.table import ARCHITECTURES, LAYERS_THAT_SHARE, Architecture
from patching.files.json_files import has_type
from patching.files.model_files import read_json
from patching.recipe import LayerSource, Recipe, Reference, whole_model

LARGEST = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10**4) | {
    "vocab_size": 10**9,
    "hidden_size": 10**9,
}
"""Fields of config.json that must be at least 1, and at most this."""

TYPES = {"architectures": list[str] | None, "_name_or_path": str | None}
"""Types of fields that transformers does not check."""

_declared: dict[tuple[type[PreTrainedConfig], str], Architecture] = {}
"""Architectures outside the table, by what decides them in a config."""


def architecture_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> Architecture:
    """Return the config's row in the table, or the architecture that transformers declares.

    Raises ValueError if neither is enough, or if a config field prevents layers from being moved.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        kind = type(config), _what_decides(config)
        if kind not in _declared:
            _declared[kind] = declared_architecture(config, trust_remote_code)
        architecture = _declared[kind]
    for flag in architecture.position_dependent_flags:
        if getattr(config, flag):
            raise ValueError(
                f"{flag}=True in the {config.model_type} config: what a layer computes then "
                "depends on its position, so it cannot be moved; only models with this flag off "
                "can be pruned and patched"
            )
    if predicts_masked_tokens(config) and config.is_decoder:
        raise ValueError(
            f"is_decoder=True in the {config.model_type} config: this model predicts the next "
            "token; of this architecture only encoders, with is_decoder off, are supported"
        )
    values = config.to_dict() | config.get_text_config().to_dict()
    for name in LAYERS_THAT_SHARE:
        if values.get(name):
            raise ValueError(
                f"{name}={values[name]} in the {config.model_type} config: layers differ by "
                "position or share their keys and values, so such models cannot be pruned and "
                "patched"
            )
    if values.get("quantization_config"):
        raise ValueError(
            f"the {config.model_type} checkpoint is quantized: use the original in floating point"
        )
    return architecture


def _what_decides(config: PreTrainedConfig) -> str:
    """Return the config without what members of one family differ in: depth, lists with an entry
    per layer, tying and dtype. Where parts lie depends on none of these.
    """
    values = config.to_dict()
    for name in (depth_field(config), "tie_word_embeddings"):  # refused if they are missing
        values[name] = values.get(name) is None
    own = {name: value for name, value in values.items() if not isinstance(value, list)}
    return json.dumps(own | {"dtype": None}, sort_keys=True, default=str)


def declared_architecture(
    config: PreTrainedConfig, trust_remote_code: bool = False
) -> Architecture:
    """Return the architecture of a config outside the table, found in an empty model.

    Raises ValueError, naming what is missing, unless the base model consists of an input embedding,
    one list of layers and a final norm, in this sequence, followed by a linear head.
    """

    def refuse(missing: str) -> ValueError:
        return ValueError(
            f"model_type={config.model_type}: this architecture is not supported, {missing}; "
            f"choose one of {', '.join(sorted(ARCHITECTURES))} or add a row to ARCHITECTURES in "
            "patching/architectures/table.py"
        )

    values = config.to_dict()
    depth = values.get(depth_field(config))
    for name in (depth_field(config), "tie_word_embeddings"):
        if values.get(name) is None:
            raise refuse(f"its config has no {name}")
    try:
        model = empty_model(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the code of a model may raise anything
        first_line = str(error).partition("\n")[0]
        raise refuse(
            f"transformers cannot build a causal language model of it ({first_line})"
        ) from error
    if config.is_encoder_decoder or model.base_model is model:
        raise refuse("it is not a base model with a head")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise refuse("it has no standard input and output embeddings")
    children = list(model.base_model.children())
    lists = [part for part in children if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(lists) != 1:
        raise refuse(f"its base model has {len(lists)} lists of {depth} layers instead of one")
    (layers,) = lists
    norms = [part for part in children if "norm" in type(part).__name__.lower()]
    others = [part for part in children if part not in (layers, embedding, *norms)]
    paths = {module: name for name, module in model.named_modules()}
    if (
        embedding not in children
        or len(norms) != 1
        or any(True for part in others for _ in part.parameters())
        or not children.index(embedding) < children.index(layers) < children.index(norms[0])
    ):
        names = ", ".join(paths[part] for part in children)
        raise refuse(
            f"it is not clear which of its parts ({names}) come before the layers and which after"
        )
    outside = {name.partition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    outside -= {model.base_model_prefix, paths[head]}
    if outside or model.base_model_prefix not in paths.values():
        raise refuse(f"it has more parts than base model and head ({', '.join(sorted(outside))})")
    last = LayerSource("teacher", depth - 1)
    deeper = config_for(Recipe.of([*whole_model(depth).layers, last]), {"teacher": config})
    deeper_model = empty_model(deeper, trust_remote_code=trust_remote_code)
    if len(deeper_model.get_submodule(paths[layers])) != depth + 1:
        raise refuse(f"the number of its layers does not follow {depth_field(config)}")
    return Architecture(
        layers=paths[layers],
        norm=paths[norms[0]],
        head=paths[head],
        embeddings=(paths[embedding],),
        takes_packed_rows=False,
    )


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the most tokens a model can read, None if its positions are computed, not learned."""
    count = architecture_of(config).count_positions
    return None if count is None else count(config)


def first_position(config: PreTrainedConfig) -> int:
    """Return the position id of a document's first token, which is 0 for most models. A RoBERTa
    counts from after its padding token's id, so its table has rows that no token uses.
    """
    count = max_positions(config)
    return 0 if count is None else config.max_position_embeddings - count


def _is_dtype(value: object) -> bool:
    """Return whether a config's field for the dtype is one, or empty."""
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    return value is None or isinstance(getattr(torch, name, None), torch.dtype)


def fault_of_sizes(values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the sizes in a config.json, None if nothing is.

    transformers makes lists with an entry per layer when it reads the file, whatever the number.
    """
    for fields in (values, values.get("text_config")):
        for name, largest in LARGEST.items() if isinstance(fields, dict) else ():
            size = fields.get(name, 1)
            if isinstance(size, int) and not 1 <= size <= largest:
                return (
                    f"{name} is {size} in its config.json, and must be at least 1 and at most "
                    f"{largest:,}: download or save it again"
                )
    return None


def read_config(
    flag: str, name_or_path: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """Read the config of a flag's model from a folder or the hub, that of a DistilBERT as a BERT's.

    Raises ValueError if it cannot be read or its architecture is not supported.
    """

    def unreadable(error: Exception) -> ValueError:
        return ValueError(
            f"{flag}={name_or_path}: this is neither a model folder nor a hub "
            f"repository that can be read from here ({error})"
        )

    try:
        values = read_json(Reference(name_or_path, revision), "config.json") or {}
    except OSError as error:
        raise unreadable(error) from error
    for name in ("dtype", "torch_dtype"):
        if name in values and not _is_dtype(values[name]):
            raise ValueError(
                f"{flag}={name_or_path}: {name} in its config.json is "
                f"{values[name]}, write a dtype such as bfloat16 or leave the field out"
            )
    for name, kind in TYPES.items():
        if not has_type(values.get(name), kind):
            raise ValueError(
                f"{flag}={name_or_path}: {name} in its config.json is {values[name]}, download or "
                "save it again, or leave the field out"
            )
    if fault := fault_of_sizes(values):
        raise ValueError(f"{flag}={name_or_path}: {fault}")
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # what transformers raises for a wrong field is no ValueError
        raise unreadable(error) from error
    config = as_bert_config(config)
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise ValueError(
            f"{flag}={name_or_path}: a {config.model_type} model has no settings of a text model "
            "of its own, and its config.json names some; download or save it again"
        )
    architecture_of(config, trust_remote_code)
    return config


def check_builds(
    flag: str, name_or_path: str, config: PreTrainedConfig, trust_remote_code: bool
) -> PreTrainedModel:
    """Return an empty model of a config that was read. Raises ValueError unless transformers builds
    one.
    """
    config = copy.deepcopy(config)  # building a model sets dtypes in it
    try:
        return empty_model(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # sizes that do not fit together end in errors of many kinds
        raise ValueError(
            f"{flag}={name_or_path}: transformers cannot build a model of its "
            f"config.json ({type(error).__name__}: {error}); download or save it again"
        ) from error
