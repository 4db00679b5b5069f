"""Files that lie next to a parent's weights, in its folder or its hub repository."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import get_relative_imports

from patching.files.lfs import check_not_a_pointer
from patching.files.model_files import find_file, read_json
from patching.recipe import Parent, Reference

TOKENIZER_CONFIG = "tokenizer_config.json"

TOKENIZER_FILES = (
    "tokenizer.*",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "emoji.json",
    "dict.txt",
    "entity_vocab.json",
    "chat_template.*",
    "additional_chat_templates/*",
)
"""Names of the files that tokenizers and chat templates are read from, as patterns."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Names of the files that say how images and videos become a multimodal model's input."""


LICENSE_FILES = tuple(
    f"{name}*"
    for word in ("license", "licence", "notice", "copying")
    for name in (word, word.upper(), word.capitalize())
)
"""Names of the files that must come with what is made from a model, as patterns."""


def tokenizer_files(reference: Reference) -> dict[str, Path]:
    """Return all files of a parent's tokenizer by their names, with the code that its
    tokenizer_config.json names. Empty if there are none.

    Raises OSError if the parent cannot be reached, ValueError if a file of code is missing.
    """
    files = _matching_files(reference, TOKENIZER_FILES)
    if TOKENIZER_CONFIG in files:
        settings = read_json(reference, TOKENIZER_CONFIG) or {}
        files |= code_files(reference, settings.get("auto_map"))
    return files


def license_files(reference: Reference) -> dict[str, Path]:
    """Return the files with a parent's license and notices by their names.

    Raises OSError if the parent cannot be reached.
    """
    return _matching_files(reference, LICENSE_FILES)


def without_clashes(files: Mapping[Parent, Mapping[str, Path]]) -> dict[str, Path]:
    """Return the files of several parents by name. Where parents have different files of one name,
    the parent comes before the name.
    """
    named: dict[str, Path] = {}
    for parent, own in files.items():
        for name, path in own.items():
            others = [other[name] for other in files.values() if name in other]
            is_same = len({path.read_bytes() for path in others}) == 1
            named[name if is_same else f"{parent}-{name}"] = path
    return named


def processor_files(reference: Reference) -> dict[str, Path]:
    """Return the files of a multimodal parent's processor by their names.

    Raises OSError if the parent cannot be reached.
    """
    return _matching_files(reference, PROCESSOR_FILES)


def _matching_files(reference: Reference, patterns: Sequence[str]) -> dict[str, Path]:
    if not reference.name_or_path:
        return {}
    folder = Path(reference.name_or_path)
    if not folder.is_dir():
        name, revision = reference
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    files = {str(path.relative_to(folder)): path for path in sorted(paths) if path.is_file()}
    for path in files.values():
        check_not_a_pointer(path)
    return files


def code_files(reference: Reference, auto_map: Any) -> dict[str, Path]:
    """Return the files of code that an `auto_map` names and those they import, by their names.

    An entry such as `repository--module.Class` names another repository, from which everybody
    loads it, so it needs no file.

    Raises ValueError if a file is missing, or lies outside the model's folder.
    """
    entries = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    classes = [name for entry in entries for name in _as_list(entry) if isinstance(name, str)]
    modules = [name.rpartition(".")[0] for name in classes if "--" not in name]
    files: dict[str, Path] = {}
    while modules:
        file_name = f"{modules.pop()}.py"
        if file_name in files:
            continue
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
            raise ValueError(
                f"{reference.name_or_path}: its code needs {file_name}, which is not in its "
                "folder; use the model as it was published"
            )
        path = find_file(reference, file_name)
        if path is None:
            raise ValueError(f"{reference.name_or_path}: {file_name} is missing: its code needs it")
        files[file_name] = path
        modules += get_relative_imports(path)
    return files


def _as_list(entry: Any) -> Iterable[Any]:
    return entry if isinstance(entry, list | tuple) else [entry]


def copy_files(files: dict[str, Path], folder: Path) -> None:
    """Copy files byte for byte into a folder, under the names they are given."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
