"""Which checkpoint a run resumes from, and whether it can."""

import os
import warnings
from pathlib import Path
from typing import Any

from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from train.checkpoints.identity import ANNOUNCED, differences, read_settings
from train.data import Share

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


def stream_file_name(share: Share) -> str:
    """The name of a checkpoint's file with a rank's position in its share of a stream."""
    return f"stream_{share.rank}_of_{share.world_size}.json"


def check_resumable(
    checkpoint: str, share: Share, is_stream: bool, is_sharded: bool, settings: dict[str, Any]
) -> None:
    """Raise ValueError, naming every reason, unless this run can resume from the checkpoint: it
    must hold the optimizer too, come from a run with the same `settings`, read its data the same
    way, a stream on the same number of ranks, and shard its models or not as before.
    """
    folder = Path(checkpoint)
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
    states = {path.name for path in folder.glob("stream_*_of_*.json")}
    if is_stream and not states:
        problems.append("its run did not read a stream, use the same --dataset and --streaming")
    elif is_stream and stream_file_name(share) not in states:
        problems.append(
            f"it has stream positions for {len(states)} ranks and this run has "
            f"{share.world_size}, start {len(states)}"
        )
    elif states and not is_stream:
        problems.append("its run read a stream, use the same --dataset and --streaming")
    if problems:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint}: {'; '.join(problems)}, or start over in "
            "another --output_dir"
        )
