"""The files that lie next to a saved model's weights and come from its teacher: config.json,
generation_config.json, the tokenizer, and code if the model runs any.

A model is used with other software than this, so these files are the teacher's own. Tokenizer and
code are copied byte for byte. The two configs keep everything that the recipe does not change.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from patching.architectures.models import is_multimodal, predicts_masked_tokens
from patching.checkpoints.parent_files import (
    code_files,
    copy_files,
    license_files,
    processor_files,
    tokenizer_files,
    without_clashes,
)
from patching.checkpoints.saved_config import saved_config
from patching.files.model_files import read_json
from patching.files.outputs import write_json
from patching.parents import Parents
from patching.recipe import Parent


@dataclass(frozen=True)
class Companions:
    """Everything next to the weights that a loader reads."""

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    files: dict[str, Path]
    """Where to copy each file from, by its name."""
    tokenizer: PreTrainedTokenizerBase | None
    """A tokenizer to write, if there are no files of one."""

    def write(self, folder: Path) -> None:
        """Write the files. What makes a folder loadable, config.json, comes last."""
        copy_files(self.files, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        generation_config = folder / "generation_config.json"
        generation_config.unlink(missing_ok=True)
        if self.generation_config is not None:
            write_json(generation_config, self.generation_config)
        write_json(folder / "config.json", self.config)


def plan_companions(
    parents: Parents,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sources: Collection[Parent] = ("teacher",),
) -> Companions:
    """Read what the files of a model are made from. The model has this config, class and dtype; one
    of its parents is the teacher.

    `tokenizer` is written only if the teacher has no files of one. `sources` are the parents that
    the weights come from; the files of their licenses are copied.

    Raises ValueError if there is no tokenizer, or if code is missing, and OSError if a parent
    cannot be reached.
    """
    stored = parents.find("teacher", lambda reference: read_json(reference, "config.json"))
    values = saved_config(stored, config, model_class, dtype)
    files = parents.find("teacher", tokenizer_files) or {}
    if not files and tokenizer is None:
        name = parents.references["teacher"].name_or_path
        raise ValueError(
            f"the teacher {name} has no files of a tokenizer: give a tokenizer, or put its files "
            "next to the weights"
            if name
            else "the teacher in memory does not say where it came from: give its tokenizer too"
        )
    if is_multimodal(config):
        files = files | (parents.find("teacher", processor_files) or {})
    generation_config = None
    if not predicts_masked_tokens(config):
        generation_config = parents.generation_config
    auto_map = values.get("auto_map")
    if auto_map:
        code = parents.find("teacher", lambda reference: code_files(reference, auto_map))
        files = files | (code or {})
    writes = None if files else tokenizer
    found = {source: parents.find(source, license_files) or {} for source in sorted(sources)}
    return Companions(values, generation_config, files | without_clashes(found), writes)


def set_generation_config(model: PreTrainedModel, parents: Parents) -> None:
    """Give a member in memory the generation settings that it would be saved with."""
    settings = parents.generation_config if model.can_generate() else None
    if settings is not None:
        model.generation_config = GenerationConfig.from_dict(settings)
