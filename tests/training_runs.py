"""Trainers of small random models on rows of random tokens."""

import shutil
from pathlib import Path

import torch
from conftest import tiny_config, tiny_model
from datasets import Dataset
from masked_models import SPECIAL_TOKENS, encoder_config, word_tokenizer
from masked_models import VOCAB_SIZE as NUM_WORDS
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from patching.architectures.models import predicts_masked_tokens
from patching.blocks import LayerMap
from train.masking import Masking
from train.student import new_student
from train.trainer import DistillationTrainer
from train.training_args import DistillationArguments

LAYER_MAP = LayerMap((0, 2, 3), 4)
MASKING = Masking.of(word_tokenizer())
BYTES = range(256)
WORDS = range(len(SPECIAL_TOKENS), NUM_WORDS)


def teacher_of(kind: str) -> PreTrainedModel:
    if kind in ("bert", "roberta"):
        return tiny_model(encoder_config(kind, LAYER_MAP.num_teacher_layers))
    return tiny_model(tiny_config(kind, LAYER_MAP.num_teacher_layers))


def rows(num_rows: int, tokens: range = BYTES, seed: int = 0) -> Dataset:
    """Return rows of different lengths, so that micro-batches differ in their targets."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 20, (num_rows,), generator=generator).tolist()
    ids = [torch.randint(tokens.start, tokens.stop, (n,), generator=generator) for n in lengths]
    return Dataset.from_list([{"input_ids": row.tolist()} for row in ids])


def trainer_for(
    folder: Path,
    teacher: str | PreTrainedModel = "qwen3-tied",
    layer_map: LayerMap = LAYER_MAP,
    **changes,
) -> DistillationTrainer:
    """Return a trainer. `teacher` is a model or a kind of one, `changes` are training flags."""
    settings = {
        "save_directory": str(folder),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    if isinstance(teacher, str):
        teacher = teacher_of(teacher)
    is_masked = predicts_masked_tokens(teacher.config)
    tokens = WORDS if is_masked else BYTES
    return DistillationTrainer(
        new_student(teacher, layer_map),
        teacher,
        layer_map,
        DistillationArguments(**settings),
        MASKING if is_masked else None,
        train_dataset=rows(64, tokens),
        eval_dataset=rows(7, tokens, seed=1),
    )


def log_of(trainer: DistillationTrainer) -> list[dict[str, float]]:
    """Return the lines of the log that report a training loss."""
    return [line for line in trainer.state.log_history if "loss" in line]


def copy_with_nan(teacher: Path, folder: Path) -> None:
    """Copy a teacher whose states are then not finite."""
    shutil.copytree(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
