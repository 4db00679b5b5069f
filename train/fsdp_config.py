"""`--fsdp_config`: settings of FSDP from a .json file, or for the layers of a model."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from patching.architectures.distilbert import as_bert_config
from patching.architectures.lookup import architecture_of
from patching.architectures.models import empty_model
from patching.files.json_files import has_type, load_json

SWITCH = ("true", "false")
SETTINGS: dict[str, tuple[str, ...]] = {
    "version": ("2",),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "transformer_layer_cls_to_wrap": (),
    "state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "reshard_after_forward": SWITCH,
    "activation_checkpointing": SWITCH,
    "cpu_offload": SWITCH,
    "cpu_ram_efficient_loading": SWITCH,
}
"""Settings that act, and their values; any value if there are none."""


def read_fsdp_config(fsdp_config: dict | str) -> dict[str, Any]:
    """Return the settings given as a dict, as JSON text, as a .json file, or as a model whose
    layers are to be wrapped.

    Raises ValueError if it is none of these, for settings that would have no effect, and for FSDP1,
    which cannot shard the teacher.
    """
    values: Any = fsdp_config
    if isinstance(fsdp_config, str):
        text = fsdp_config
        if not text.startswith("{"):
            if not fsdp_config.endswith(".json"):
                return {"transformer_layer_cls_to_wrap": layer_classes(fsdp_config)}
            if not os.path.isfile(fsdp_config):
                raise ValueError(
                    f"fsdp_config={fsdp_config}: no such file; name a .json file or a model"
                )
            text = None
        try:
            values = json.loads(text) if text else load_json(Path(fsdp_config))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"fsdp_config={fsdp_config} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"fsdp_config={fsdp_config}: not a JSON object of settings")
    values = {name.removeprefix("fsdp_"): value for name, value in values.items()}
    problems = [
        f"{name} is not a setting of FSDP2 here, choose from {', '.join(SETTINGS)}"
        for name in sorted(values.keys() - SETTINGS.keys())
    ]
    problems += [
        f"{name}={values[name]}: choose {' or '.join(map(str, allowed))}, or leave it out"
        for name, allowed in SETTINGS.items()
        if allowed and name in values and str(values[name]).lower() not in map(str.lower, allowed)
    ]
    classes = values.get("transformer_layer_cls_to_wrap")
    if not has_type(classes, list[str] | str | None):
        problems.append(f"transformer_layer_cls_to_wrap={classes}: write a list of class names")
    if str(values.get("sharding_strategy", "")).startswith("HYBRID"):
        problems.append("to share one copy of the models per node, use --fsdp_replicas NODES")
    if problems:
        raise ValueError(f"fsdp_config: {'; '.join(problems)}")
    # The text "false" would count as true.
    return {
        name: str(value).lower() == "true" if SETTINGS[name] == SWITCH else value
        for name, value in values.items()
    }


def layer_classes(model_name_or_path: str) -> list[str]:
    """Return the class names of a language model's layers.

    Raises ValueError for a name that is no model and for an unsupported architecture.
    """
    try:
        config = as_bert_config(AutoConfig.from_pretrained(model_name_or_path))
    except Exception as error:  # what transformers raises for a wrong field is no ValueError
        raise ValueError(
            f"fsdp_config={model_name_or_path}: neither a .json file nor a model that can be read "
            f"({error})"
        ) from error
    path = architecture_of(config).layers  # first, for its error on unsupported architectures
    return sorted({type(layer).__name__ for layer in empty_model(config).get_submodule(path)})


def check_layer_classes(fsdp_config: dict[str, Any], teacher: PreTrainedConfig) -> None:
    """Raise ValueError if the layers to wrap belong to another architecture than the teacher's."""
    wanted = set(fsdp_config.get("transformer_layer_cls_to_wrap") or ())
    if missing := wanted - {type(module).__name__ for module in empty_model(teacher).modules()}:
        raise ValueError(
            f"fsdp_config: a {teacher.model_type} model has no {', '.join(sorted(missing))}, "
            "name the teacher itself as --fsdp_config"
        )
