"""Older spellings of config fields, for software that does not know the newer ones.

transformers 5 writes `rope_parameters` and `dtype`. transformers 4, mlx-lm and llama.cpp's
converter read the fields below, and take defaults where they are missing. Writing both is safe:
transformers 5 reads either.
"""

from typing import Any

OLDER_NAMES: dict[str, dict[str, str]] = {
    "gpt2": {"n_positions": "n_ctx"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""Older names of fields, by model_type and newer name."""

OLDER_ROTARY_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta"},
}
"""Older names of the entries of `rope_parameters`, by model_type. They are the same elsewhere."""

OLDER_LOCAL_BASE: dict[str, str | None] = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
    "olmo3": None,
}
"""Architectures whose `rope_parameters` differ by kind of layer, with the older name of the base of
their sliding layers. None: older readers use the base of the other layers.
"""

LONGROPE_FIELDS = ("type", "short_factor", "long_factor")
"""The older `rope_scaling` of a Phi-3 with long context, which must have no other field."""

ROTARY_FIELDS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_emb_base",
    "rotary_pct",
    "rope_local_base_freq",
    "global_rope_theta",
    "local_rope_theta",
)
"""Every field that may hold rotary settings, the newer one first."""


def with_older_spellings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json with older spellings after the newer ones. A field that
    is there already is left alone.
    """
    model_type = values["model_type"]
    older_names = {"dtype": "torch_dtype", **OLDER_NAMES.get(model_type, {})}
    result: dict[str, Any] = {}
    for name, value in values.items():
        result[name] = value
        if name == "rope_parameters":
            older = older_rotary_fields(model_type, value)
        else:
            older_name = older_names.get(name)
            older = {} if older_name is None else {older_name: value}
        result |= {name: value for name, value in older.items() if name not in values}
    return result


def older_rotary_fields(model_type: str, rope_parameters: Any) -> dict[str, Any]:
    """Return what older readers need in place of `rope_parameters`; nothing for settings that had
    no older form.
    """
    if not isinstance(rope_parameters, dict):
        return {}
    fields = {}
    settings = dict(rope_parameters)
    if any(isinstance(value, dict) for value in settings.values()):  # one for each kind of layer
        if model_type not in OLDER_LOCAL_BASE:
            return {}
        settings = dict(settings.get("full_attention") or {})
        local = rope_parameters.get("sliding_attention") or {}
        local_name = OLDER_LOCAL_BASE[model_type]
        if local_name is not None and "rope_theta" in local:
            fields[local_name] = local["rope_theta"]
    names = OLDER_ROTARY_NAMES.get(model_type, {})
    for name in ("rope_theta", "partial_rotary_factor"):
        value = settings.pop(name, None)
        if value is not None:
            fields = {names.get(name, name): value, **fields}
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type == "longrope" and model_type == "phi3":
        settings["type"] = rope_type
        settings = {name: settings[name] for name in LONGROPE_FIELDS}
    if rope_type != "default":
        fields["rope_scaling"] = settings
    return fields


def rotary_settings(rope_parameters: Any) -> Any:
    """Return `rope_parameters` without what is only an older name of its `rope_type`."""
    if not isinstance(rope_parameters, dict):
        return rope_parameters
    return {
        name: rotary_settings(value)
        for name, value in rope_parameters.items()
        if name != "type" or "rope_type" not in rope_parameters
    }
