"""Which checkpoint a run resumes from, and whether it can."""

import os
import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from patching.checkpoints.safetensors_files import read_header
from patching.files.json_files import MOST_BYTES_OF_RECORDS, check_types, read_object
from train.checkpoints.identity import ANNOUNCED, differences, read_settings

LAST = ("last", "true")
"""Values of `--resume_from_checkpoint` that ask for the newest checkpoint."""


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> str | None:
    """Return the folder to resume from, or None to start from the beginning. `last` also starts
    from the beginning if there is no checkpoint yet.

    Raises ValueError for a folder that is not a checkpoint.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    if resume_from_checkpoint.lower() in LAST:
        return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume_from_checkpoint}: no checkpoint there, name a folder "
            f"checkpoint-N in {output_dir}, or `last`"
        )
    return resume_from_checkpoint


def check_only_its_checkpoints(checkpoint: str | None, output_dir: str) -> None:
    """Raise ValueError if the folder for checkpoints holds some and the run does not resume from
    there. Two runs in one folder would remove each other's checkpoints, the ones of fewer steps.
    """
    found = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if found is None:
        return
    if checkpoint is None or Path(checkpoint).resolve().parent != Path(output_dir).resolve():
        raise ValueError(
            f"output_dir={output_dir}: it holds {Path(found).name} of an earlier run, add "
            "--resume_from_checkpoint last to continue that, name another --output_dir, or remove "
            "its checkpoints"
        )


PICKLED = (".pt", ".pth")
"""Files of optimizer, schedule and random numbers."""
STREAM_FILE_NAME = "stream.json"
"""A checkpoint's file with the position in the stream. Its run has read none without it."""


def check_resumable(
    checkpoint: str, is_stream: bool, is_sharded: bool, settings: dict[str, Any]
) -> None:
    """Raise ValueError, naming every reason, unless this run can resume from the checkpoint: it
    must hold the optimizer too, come from a run with the same `settings`, read its data the same
    way, and shard its models or not as before. Raises ValueError for a damaged file, too.
    """
    folder = Path(checkpoint)
    for name in (TRAINER_STATE_NAME, STREAM_FILE_NAME):
        if (folder / name).is_file():  # before the first step there is no position in a stream
            read_object(folder / name, name == STREAM_FILE_NAME, MOST_BYTES_OF_RECORDS)
    problems = []
    if not any(folder.glob("optimizer*")):
        problems.append("it holds only the model (--save_only_model), so no run can continue it")
    before = read_settings(checkpoint)
    if before is None:
        warnings.warn(
            f"resume_from_checkpoint={checkpoint}: it does not record what made it, so nothing "
            "shows that this run has the same teacher, layers, text and settings",
            stacklevel=2,
        )
    else:
        problems += differences(before, settings, besides=ANNOUNCED)
    if any(folder.glob(f"{FSDP_MODEL_NAME}*")) != is_sharded:
        was = "was not sharded" if is_sharded else "was sharded"
        problems.append(f"its run {was}, use the same --fsdp_config and ranks")
    if any(folder.glob("stream_*_of_*.json")):
        problems.append("each rank of its run, by an older version, read a part of the stream")
    elif is_stream != (folder / STREAM_FILE_NAME).is_file():
        how = "did not read a stream" if is_stream else "read a stream"
        problems.append(f"its run {how}, use the same --dataset and --streaming")
    if problems:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint}: {'; '.join(problems)}, or start over in "
            "another --output_dir"
        )
    check_whole(folder)


def check_whole(folder: Path) -> None:
    """Raise ValueError for a file of a checkpoint that is missing or damaged, without reading
    weights.
    """
    try:
        state = read_object(folder / TRAINER_STATE_NAME, most_bytes=MOST_BYTES_OF_RECORDS)
        check_types(state.get("global_step"), int, f"{folder / TRAINER_STATE_NAME}: global_step")
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors":
                read_header(path)
            elif path.suffix in PICKLED and not is_zipfile(path):
                raise ValueError(
                    f"{path} is damaged: it is not a file of PyTorch, or a part of one"
                )
    except ValueError as error:
        raise ValueError(
            f"{error}; resume from an earlier checkpoint than {folder.name}"
        ) from error
