"""Small trained teachers and students, a pair for each architecture that engines are checked with.

Random weights would leave the likeliest token to rounding errors, so a teacher learns from the
source of the standard library for some minutes and `train.train` distills its student. Configs of
some pairs are saved as transformers 5 writes them, others as models are published on the hub.
"""

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from examples.commands import run
from examples.engines.environments import FOLDER, python_of, run_in
from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.demo import TEACHER as SHIPPED_TEACHER
from examples.stdlib.demo import as_flags
from examples.stdlib.train_teacher import (
    cut_into_rows,
    tokenize,
    train_tokenizer,
    training_batches,
)
from examples.stdlib.training import Run, next_token_loss, save_tokenizer, train

RUNNERS = Path(__file__).parent / "runners"
VOCAB_SIZE = 2048
MODULE_CHARACTERS = 20_000
NUM_MODULES = 160
"""Text of a few minutes' training: the beginnings of this many modules."""
TEACHER_STEPS = 60
ROWS_PER_STEP = 2
"""Rows of 512 tokens, or twice as many of 256."""
DISTILLATION = {
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 20,
    "learning_rate": 5e-4,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 10,
}


class Pair(NamedTuple):
    """How a teacher is made, and which of its layers the student keeps."""

    settings: dict[str, Any]
    """The config, as transformers 5 spells it."""
    published: dict[str, Any] | None = None
    """Fields of a published config.json that replace `rope_parameters`, None to save it as
    transformers 5 does.
    """
    first_layers_to_keep: int = 1
    alternate_every_n_layers: int = 2
    last_layers_to_keep: int = 2
    sentencepiece: bool = False


SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 32}
LLAMA3_ROTARY = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

PAIRS = {
    "llama": Pair(
        GROUPED
        | {
            "rope_parameters": {"rope_theta": 500_000.0, **LLAMA3_ROTARY},
            "tie_word_embeddings": False,
        },
        published={"rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROTARY},
    ),
    "qwen3": Pair(
        GROUPED
        | {
            "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
        },
        published={"rope_theta": 1_000_000, "rope_scaling": None},
    ),
    "mistral": Pair(
        GROUPED
        | {
            "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        sentencepiece=True,
    ),
    # mlx-lm takes its MLP to be four times as wide as the model, which it is in published ones.
    "gpt_neox": Pair(
        SHAPE
        | {
            "intermediate_size": 512,
            "rope_parameters": {
                "rope_theta": 10_000.0,
                "rope_type": "default",
                "partial_rotary_factor": 0.25,
            },
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
        },
        published={"rotary_pct": 0.25, "rotary_emb_base": 10_000},
    ),
    "gpt2": Pair(
        {
            "n_embd": 128,
            "n_layer": 8,
            "n_head": 4,
            "n_positions": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    ),
    # Every second layer has full attention. Blocks of three layers keep that so in every size.
    "gemma2": Pair(
        GROUPED
        | {
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "tie_word_embeddings": True,
        },
        first_layers_to_keep=2,
        alternate_every_n_layers=3,
        last_layers_to_keep=1,
        sentencepiece=True,
    ),
    # Every sixth layer has full attention. Blocks of seven layers keep that so in every size, and
    # mlx-lm needs six layers or more.
    "gemma3_text": Pair(
        GROUPED
        | {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 18,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "tie_word_embeddings": True,
        },
        first_layers_to_keep=4,
        alternate_every_n_layers=7,
        last_layers_to_keep=1,
        sentencepiece=True,
    ),
}


def pair_folders(name: str) -> tuple[Path, Path]:
    """Return the folders of a pair's teacher and student, trained first if they are missing or were
    made with other settings. The pair `demo` has the shipped teacher.
    """
    folder, pair = FOLDER / "pairs" / name, PAIRS.get(name, Pair({}))
    teacher = SHIPPED_TEACHER if name == "demo" else folder / "teacher"
    settings = {**pair._asdict(), "steps": TEACHER_STEPS, "distillation": DISTILLATION}
    record, wanted = folder / "pair.json", json.dumps(settings, indent=1) + "\n"
    if not (record.exists() and record.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"training the pair {name}", flush=True)
        if name != "demo":
            train_teacher(name, pair, teacher)
        distill(pair, teacher, folder)
        record.write_text(wanted)
    return teacher, folder / "student"


def train_teacher(name: str, pair: Pair, folder: Path) -> Run:
    """Train a teacher and save it with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(pair.sentencepiece))
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CONFIG_MAPPING[name](**special, **pair.settings, initializer_range=0.06)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    documents = tokenize(texts(held_out=False), tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than so few steps
        run = train(
            model,
            next_token_loss,
            training_batches(documents, ROWS_PER_STEP, TEACHER_STEPS, generator),
            steps=TEACHER_STEPS,
            warmup_steps=10,
            muon_lr=0.02,
            adam_lr=4e-3,
        )
    model.float().save_pretrained(folder)
    for file in tokenizer_folder(pair.sentencepiece).iterdir():
        shutil.copy(file, folder)
    if pair.published is not None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for newer in ("rope_parameters", "layer_types", "dtype"):
            values.pop(newer, None)
        values |= {**pair.published, "torch_dtype": "float32", "transformers_version": "4.51.0"}
        path.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")
        assert AutoConfig.from_pretrained(folder).rope_parameters == config.rope_parameters
    return run


def distill(pair: Pair, teacher: Path, folder: Path) -> None:
    """Distill a student into `folder/student`."""
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": module.text}) + "\n" for module in texts(held_out=False))
    text.write_text("".join(lines))
    settings = {
        **DISTILLATION,
        "measure_order": False,
        "teacher_model_name_or_path": teacher,
        "save_directory": folder / "student",
        "dataset": text,
        "first_layers_to_keep": pair.first_layers_to_keep,
        "alternate_every_n_layers": pair.alternate_every_n_layers,
        "last_layers_to_keep": pair.last_layers_to_keep,
    }
    run("train.train", *as_flags(settings))
    text.unlink()


def tokenizer_folder(sentencepiece: bool) -> Path:
    """Return the folder of a tokenizer, trained first if it is missing: byte-level BPE, or
    SentencePiece as transformers 4 saves it.
    """
    folder = FOLDER / "tokenizers" / ("sentencepiece" if sentencepiece else "bpe")
    if folder.exists():
        return folder
    staging = folder.with_suffix(".part")
    shutil.rmtree(staging, ignore_errors=True)
    modules = texts(held_out=False)
    if sentencepiece:
        text = folder.parent / "text.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(module.text for module in modules))
        python = python_of("transformers4")
        script = RUNNERS / "train_sentencepiece.py"
        run_in("transformers4", [*map(str, (python, script, text, staging, VOCAB_SIZE))])
        text.unlink()
    else:
        save_tokenizer(train_tokenizer(modules, VOCAB_SIZE), staging)
    staging.rename(folder)
    return folder


@lru_cache
def texts(held_out: bool) -> list[Module]:
    """Return beginnings of modules, spread evenly over the library."""
    modules = [module for module in iter_modules() if is_held_out(module.name) == held_out]
    step = max(1, len(modules) // NUM_MODULES)
    return [Module(name, text[:MODULE_CHARACTERS]) for name, text in modules[::step]]


def held_out_rows(tokenizer: PreTrainedTokenizerBase, num_rows: int, row_tokens: int):
    """Return rows of token ids that no pair was trained on, shape (R, T)."""
    rows_RT = cut_into_rows(tokenize(texts(held_out=True), tokenizer), row_tokens)
    assert len(rows_RT) >= num_rows
    return rows_RT[:num_rows]
