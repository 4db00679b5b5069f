"""What made a checkpoint or a student: the settings that a run must share to continue it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from patching.blocks import LayerMap
from patching.files.json_files import read_object
from patching.files.texts import state_of_files
from train.data import Rows
from train.data_args import DataArguments

FILE_NAME = "made_by.json"

ANNOUNCED = ("dataset", "max_steps", "num_train_epochs", "learning_rate")
"""Flags that may differ when a run is continued, which says so."""
MAY_CHANGE = (
    # files, uploads, logs and figures
    "save_*", "output_dir", "dry_run*", "resume_from_checkpoint", "push_to_hub", "public", "hub_*",
    "log*", "disable_tqdm", "report_to", "run_name", "project", "trackio_*", "skip_memory_metrics",
    "eval_*", "per_device_eval_batch_size",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "do_eval",
    # how the same numbers are computed
    "*_checkpointing*", "torch_compile*", "torch_empty_cache_steps", "*liger_kernel*",
    "attn_implementation", "dataloader_*", "ddp_*", "fsdp*", "accelerator_config", "use_cpu",
    "tf32", "full_determinism", "trust_remote_code", "use_cache",
    # compared as what they lead to: the teacher's weights, the kept layers, rows and their number
    "teacher_model_name_or_path", "revision", "*_layers_to_keep", "alternate_every_n_layers",
    "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_*",
    "tokenizer_processes", "sft_max_refused",
    # what is measured once the student is saved
    "order_budget",
)  # fmt: skip
"""Flags, or patterns of their names, that may differ when a run is continued."""
ROWS_PER_READ = 10_000
OF_CHOICE = ("num_kept_layers", "target_params", "longest_block", "calibration*")
"""Flags that only matter where the kept layers are chosen."""


def values_of(flags: Sequence[Any]) -> dict[str, Any]:
    """Return all flags of several groups by name."""
    values: dict[str, Any] = {}
    for group in flags:
        values |= group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
    return values


def run_settings(
    values: dict[str, Any], layer_map: LayerMap, teacher: str, world_size: int
) -> dict[str, Any]:
    """Return every setting that a run must share with the checkpoint it resumes from. `values` are
    its flags, and `teacher` is the fingerprint of the teacher's weights.
    """
    may_change = MAY_CHANGE if values["kept_layers"] == "auto" else (*MAY_CHANGE, *OF_CHOICE)
    settings = {
        name: value
        for name, value in values.items()
        if not any(fnmatch(name, pattern) for pattern in may_change)
    }
    rows_per_micro_batch = values["per_device_train_batch_size"] * world_size
    settings |= {
        "kept_layers": list(layer_map.kept),
        "num_teacher_layers": layer_map.num_teacher_layers,
        "teacher": teacher,
        "rows_per_step": rows_per_micro_batch * values["gradient_accumulation_steps"],
    }
    return json.loads(json.dumps(settings, default=str))


def text_settings(rows: Rows, sources: Sequence[str], data_args: DataArguments) -> dict[str, Any]:
    """Return what identifies the text: the training rows of local text, or the name of a stream and
    the bytes of its `sources`, and how many of its documents are held out. Older checkpoints know
    less.
    """
    if isinstance(rows.train, Dataset):
        return {"text": sample_fingerprint(rows.train), "all_rows": rows_fingerprint(rows.train)}
    dataset = data_args.dataset
    return {
        "text": os.path.abspath(dataset) if os.path.exists(dataset) else dataset,
        "stream_bytes": [bytes_of_text(source) for source in sources],
        "held_out_of_stream": data_args.num_held_out,
    }


def sample_fingerprint(rows: Dataset) -> str:
    """Return the number of rows and a hash of about a hundred of them."""
    digest, num_rows = hashlib.sha256(), len(rows)
    for i in range(0, num_rows, max(1, num_rows // 100)):
        digest.update(json.dumps(rows[i], sort_keys=True).encode())
    return f"{num_rows} rows {digest.hexdigest()[:16]}"


def rows_fingerprint(rows: Dataset) -> str:
    """Return a hash of all rows, whose columns hold lists of integers."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(ROWS_PER_READ):
        for name in sorted(table.column_names):
            lists = table.column(name).combine_chunks()
            for numbers in (lists.value_lengths(), lists.flatten()):
                digest.update(numbers.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def bytes_of_text(name: str) -> int:
    """Return the bytes of the files of a local text, 0 for a hub dataset."""
    return sum(num_bytes for _, num_bytes, *_ in state_of_files(name))


def template_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what identifies a chat template, or several by name."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def read_settings(checkpoint: str) -> dict[str, Any] | None:
    """Return the settings that made a checkpoint, or None if it does not record them."""
    path = Path(checkpoint, FILE_NAME)
    return read_object(path) if path.is_file() else None


def differences(
    before: dict[str, Any], now: dict[str, Any], besides: Collection[str] = ()
) -> list[str]:
    """Return one text per setting that both know and that differs, not counting `besides`."""
    return [
        f"{name} was {before[name]} and is {value}"
        for name, value in now.items()
        if name in before and before[name] != value and name not in besides
    ]
