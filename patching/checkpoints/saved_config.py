"""config.json and generation_config.json of a saved model: the teacher's own, with what changed.

Software that knows nothing of this toolkit reads these files, often with other defaults than those
of the transformers installed here. So the files are edited, not rewritten: fields keep their names,
values and sequence, unknown ones included.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from patching.architectures.layer_pattern import PATTERN_FIELDS, keeps_period
from patching.architectures.older_spellings import (
    ROTARY_FIELDS,
    rotary_settings,
    with_older_spellings,
)
from patching.architectures.table import PER_LAYER_LISTS

BOOKKEEPING = {"architectures", "auto_map", "dtype", "transformers_version"}
"""Fields that are not compared: they are set on purpose, or say who wrote the file."""


TOWER = "text_config"
"""The field that holds the config of a multimodal model's text tower."""


def saved_config(
    stored: dict[str, Any] | None,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the contents of config.json for a model with this config, of this class and dtype.

    `stored` is the teacher's file. If it is None, or of another architecture, the fields are those
    that transformers writes.
    """
    if stored is None or stored.get("model_type") != config.model_type:
        stored = json.loads(config.to_json_string())
        stored.pop("_name_or_path", None)
    values = _edited(stored, config)
    tower = config.get_text_config()
    if tower is not config:
        # Older files hold the settings of both in one object.
        edited = _edited(values.get(TOWER, values), tower)
        values = values | {TOWER: with_older_spellings(edited)} if TOWER in values else edited
    if Path(values.get("_name_or_path") or "").is_absolute():  # of whoever wrote the file
        del values["_name_or_path"]
    if "auto_map" in values and not runs_remote_code(config, model_class):
        del values["auto_map"]
    if model_class.__name__ not in (values.get("architectures") or ()):
        values["architectures"] = [model_class.__name__]
    for name in ("dtype", "torch_dtype"):
        if name in values or (name == "dtype" and "torch_dtype" not in values):
            values[name] = str(dtype).removeprefix("torch.")
    values = with_older_spellings(values)
    differing = changed(values, config) - set(PATTERN_FIELDS)  # which the lists overrule
    assert not differing, f"config.json would be read with another {', '.join(sorted(differing))}"
    return values


def _edited(stored: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Return the contents of a file with the fields changed in which `config` differs, without the
    settings of a text tower.
    """
    values = dict(stored)
    fields = _fields(config)
    differing = changed(values, config) - {TOWER}
    if "rope_parameters" in differing:
        values = {name: value for name, value in values.items() if name not in ROTARY_FIELDS}
    # A list that the file leaves to other fields is written only if it does not follow from them.
    left_to_others = {name for name in PER_LAYER_LISTS if values.get(name) is None}
    for name in sorted(differing - left_to_others):
        key = name_in_file(values, config, name)
        if name in PER_LAYER_LISTS:
            # Kinds of layers may have names in the file that are only known to its readers.
            spelled = dict(zip(_fields(_read(stored, config))[name], stored[key]))
            fields[name] = [spelled.get(kind, kind) for kind in fields[name]]
        values[key] = fields[name]
    for name in sorted(changed(values, config) - {TOWER}):
        values[name] = fields[name]
    if not keeps_period(config):
        values = {name: value for name, value in values.items() if name not in PATTERN_FIELDS}
    return values


def changed(values: dict[str, Any], config: PreTrainedConfig) -> set[str]:
    """Return the fields that a config.json gives another value than `config` has."""
    found, wanted = _fields(_read(values, config)), _fields(config)
    return {
        name
        for name in wanted
        if found.get(name) != wanted[name]
        and name not in BOOKKEEPING
        and not name.startswith("_")  # what the class derives from other fields
    }


def _read(values: dict[str, Any], config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that transformers reads from a config.json."""
    # Infinity has a spelling of transformers' own in such files.
    values = type(config)._decode_special_floats(json.loads(json.dumps(values)))
    return type(config).from_dict(values)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return all fields of a config as config.json holds them."""
    fields = json.loads(config.to_json_string(use_diff=False))
    if "rope_parameters" in fields:
        fields["rope_parameters"] = rotary_settings(fields["rope_parameters"])
    tower = config.get_text_config()
    if tower is not config:
        ignored = BOOKKEEPING | {"tie_word_embeddings"}  # decided by the field of the whole
        fields[TOWER] = {
            name: value
            for name, value in _fields(tower).items()
            if name not in ignored and not name.startswith("_")
        }
    return fields


def name_in_file(values: dict[str, Any], config: PreTrainedConfig, name: str) -> str:
    """Return the name under which a file holds a field, which may be an alias that the
    architecture knows.
    """
    aliases = [alias for alias, field in config.attribute_map.items() if field == name]
    return next((alias for alias in aliases if alias in values and name not in values), name)


def runs_remote_code(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    """Return whether a model runs code that came with its weights."""
    # FSDP puts a class of its own in front of the model's.
    modules = {cls.__module__ for cls in (type(config), *model_class.__mro__)}
    return any(module.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME for module in modules)
