"""Checkpoints that are complete or absent.

A checkpoint is written in `.incomplete` next to the others and is renamed to `checkpoint-N` once
every rank has finished. A folder with that name is therefore always complete, whenever the run is
killed. All ranks must see one file system, as Trainer's checkpoints of sharded models require too.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from train.training_args import DistillationArguments

INCOMPLETE = ".incomplete"


@contextmanager
def staged_checkpoint(
    args: DistillationArguments, state: TrainerState, accelerator: Accelerator
) -> Iterator[Path]:
    """Yield the folder to write this step's checkpoint into, the same one on every rank. It is
    renamed after the block.
    """
    output_dir, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    staging = output_dir / INCOMPLETE
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    yield staging / name
    accelerator.wait_for_everyone()
    # Trainer has looked for it in `staging`, where another rank may not have made it yet.
    best = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best == name or (output_dir / best).is_dir():
        state.best_model_checkpoint = str(output_dir / best)
    if args.should_save:
        if state.best_model_checkpoint is not None:
            state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        if (output_dir / name).exists():  # from an earlier run
            os.replace(output_dir / name, staging / f"{name}.replaced")
        os.replace(staging / name, output_dir / name)
        shutil.rmtree(staging)
    accelerator.wait_for_everyone()


def newest_checkpoint(output_dir: str, besides: Path | None) -> str | None:
    """Return the newest checkpoint in a folder, not counting `besides`, or None."""
    if not Path(output_dir).is_dir():
        return None
    names = sort_checkpoints(output_dir)
    others = [name for name in names if besides is None or Path(name).name != besides.name]
    return others[-1] if others else None


def best_checkpoint(
    output_dir: str, log: list[dict[str, Any]], metric: str
) -> tuple[float, int, str] | None:
    """Return the lowest value of a held-out metric in a run's log among the checkpoints that are
    still there, with its step and the checkpoint; None if none is.
    """
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    found = []
    for line in log:
        checkpoint = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{line['step']}")
        if name in line and checkpoint.is_dir():
            found.append((line[name], line["step"], str(checkpoint)))
    return min(found, default=None)


def set_aside(checkpoint: Path, should_rename: bool) -> Path:
    """Rename a checkpoint so that no run resumes from it, on one rank, and return its new name."""
    aside = checkpoint.with_name(f"{checkpoint.name}.diverged")
    if should_rename:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
    return aside


def remove_old(output_dir: Path, save_total_limit: int | None, best: str | None) -> None:
    """Remove all checkpoints but the newest `save_total_limit` and the best one."""
    if not save_total_limit or save_total_limit < 0:
        return
    for checkpoint in sort_checkpoints(str(output_dir))[:-save_total_limit]:
        if best is None or Path(checkpoint).name != Path(best).name:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = output_dir / INCOMPLETE
            os.replace(checkpoint, doomed)
            shutil.rmtree(doomed)
