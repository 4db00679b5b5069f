"""Small random models and texts for all tests. No test uses a network."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

# Before torch is imported: workers of pytest-xdist share the cores, one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from patching.architectures.models import auto_class
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import initial_student
from patching.student_config import StudentConfig

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 257  # every byte, and end of text

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 1,
}
GROUPED = {"num_key_value_heads": 2}


def tiny_config(kind: str, num_layers: int) -> PreTrainedConfig:
    """A config by model_type, with `-tied` or `-untied` appended where that matters."""
    model_type, _, tying = kind.partition("-")
    tied = {"tie_word_embeddings": tying == "tied"}
    match model_type:
        case "llama":
            return LlamaConfig(num_hidden_layers=num_layers, **SHAPE, **GROUPED, **tied)
        case "mistral":
            return MistralConfig(
                num_hidden_layers=num_layers, sliding_window=None, **SHAPE, **GROUPED, **tied
            )
        case "qwen2":
            return Qwen2Config(num_hidden_layers=num_layers, **SHAPE, **GROUPED, **tied)
        case "qwen2mixed":
            # Mixed kinds of attention, so that the kind must follow its layer.
            return Qwen2Config(
                num_hidden_layers=num_layers,
                use_sliding_window=True,
                sliding_window=4,
                layer_types=[
                    "sliding_attention" if i % 3 == 1 else "full_attention"
                    for i in range(num_layers)
                ],
                **SHAPE,
                **GROUPED,
                **tied,
            )
        case "qwen3":
            return Qwen3Config(num_hidden_layers=num_layers, head_dim=8, **SHAPE, **GROUPED, **tied)
        case "gpt_neox":
            return GPTNeoXConfig(num_hidden_layers=num_layers, **SHAPE, **tied)
        case "gpt2":
            shape = {k: v for k, v in SHAPE.items() if k.endswith("_id") or k == "vocab_size"}
            return GPT2Config(n_embd=32, n_layer=num_layers, n_head=4, n_positions=128, **shape)
    raise AssertionError(kind)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, large enough that every layer changes the output."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def trained_student(teacher: PreTrainedModel, layer_map: LayerMap) -> PreTrainedModel:
    """A student with every tensor different from the teacher's, as after distillation."""
    student = copy.deepcopy(assemble(initial_student(layer_map), teacher=teacher))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return student.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and end of text, which is also the padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | {"<eos>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_pair(
    folder: Path, kind: str = "qwen3-tied", kept=(0, 2, 4, 5), num_layers: int = 6
) -> tuple[Path, Path]:
    """Save a teacher and a student to disk, as a user has them."""
    layer_map = LayerMap(kept, num_layers)
    teacher = tiny_model(tiny_config(kind, num_layers))
    student = trained_student(teacher, layer_map)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    StudentConfig(layer_map).save(folder / "student")
    return folder / "teacher", folder / "student"


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a tied qwen3 teacher of 6 layers and its student, kept 0,2,4,5."""
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty different documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        json.dumps(
            {"text": f"Document {i} says {' '.join(str(i * j) for j in range(i % 17 + 2))}."}
        )
        for i in range(40)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_module(
    *arguments: str | Path, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python -m ...` in the repository, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
