"""What a member's generation_config.json says: what the teacher's says, above all where text ends.

The student's settings count only where the teacher has none. Otherwise a member whose embedding
comes from the student could lose the end-of-text tokens of a chat model and never stop.
"""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

BOOKKEEPING = {"_from_model_config", "transformers_version"}
"""Keys that say where settings come from and are no settings."""


def filled(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teacher's settings, and those of the student for keys the teacher lacks. A null
    is no setting.
    """
    more = {
        name: value
        for name, value in student.items()
        if value is not None and teacher.get(name) is None and name not in BOOKKEEPING
    }
    return {**teacher, **more}


def member_settings(
    teacher: Mapping[str, Any] | None, implied: Mapping[str, Any], student: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the contents of a member's generation_config.json, None if it needs no such file.

    `teacher` and `student` are the contents of theirs, None if they have none. `implied` are the
    settings that the teacher's config.json stands for where there is no other file.
    """
    known = implied if teacher is None else teacher
    settings = filled(known, student or {})
    return None if teacher is None and settings == dict(known) else settings


def check_settings(parent: str, stored: Mapping[str, Any]) -> None:
    """Raise ValueError for the contents of a generation_config.json that no model loads with."""
    try:
        GenerationConfig.from_dict(dict(stored))
    except Exception as error:  # wrong types end in errors of many kinds
        raise ValueError(
            f"the {parent}'s generation_config.json cannot be read ({type(error).__name__}: "
            f"{error}): download or save it again"
        ) from error


def own_settings(
    stored: dict[str, Any] | None, model: PreTrainedModel | None
) -> dict[str, Any] | None:
    """Return a parent's generation settings as its file holds them. If the parent is a `model` in
    memory with other settings than its file, they are written as transformers writes them.
    """
    if model is None or not model.can_generate():
        return stored
    config = model.generation_config
    if stored is not None and _settings(GenerationConfig.from_dict(stored)) == _settings(config):
        return stored
    return None if stored is None and config._from_model_config else _settings(config)


def implied_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation settings in the contents of a config.json."""
    return _settings(GenerationConfig.from_model_config(dict(config)))


def _settings(config: GenerationConfig) -> dict[str, Any]:
    values = config.to_diff_dict()
    return {name: value for name, value in values.items() if name not in BOOKKEEPING}
