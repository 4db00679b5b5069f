"""The training loop of the example models: it learns, and a seed determines the run."""

import json
from itertools import cycle

import pytest
import torch
from conftest import VOCAB_SIZE, byte_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from examples.stdlib import training
from examples.stdlib.training import Run, held_out_loss, next_token_loss, save, train

ROWS_RT = torch.arange(4 * 16).reshape(4, 16) % 23 + 97


@pytest.fixture(autouse=True)
def without_compilation(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(training, "LOG_EVERY_STEPS", 1)


def run(seed: int, steps: int = 30) -> tuple[torch.nn.Module, Run]:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3-tied", 3), dtype=torch.float32)
    settings = {"steps": steps, "warmup_steps": 3, "muon_lr": 0.02, "adam_lr": 0.01}
    return model, train(model, next_token_loss, cycle([(ROWS_RT,)]), **settings)


def test_it_learns_and_a_seed_determines_the_run():
    model, first = run(seed=0)
    losses = [line["loss"] for line in first.log]
    assert losses[0] > 0.9 * torch.tensor(float(VOCAB_SIZE)).log()
    assert losses[-1] < 0.3 * losses[0]
    assert first.steps == len(first.log) == 30
    assert first.trained_tokens == 30 * ROWS_RT.numel()
    assert model.dtype == torch.bfloat16
    _, again = run(seed=0)
    assert again.log == first.log
    _, other = run(seed=1, steps=2)
    assert other.log[0] != first.log[0]


def test_what_is_saved_says_how_it_was_made(tmp_path):
    model, record = run(seed=0, steps=2)
    held_out = held_out_loss(model, next_token_loss, [(ROWS_RT,), (ROWS_RT[:1],)])
    settings = {"steps": 2, "seed": 0, "save_directory": tmp_path}
    save(tmp_path, model, byte_tokenizer(), settings, record, held_out=held_out)
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["arguments"] == {"steps": 2, "seed": 0}
    assert found["log"] == record.log
    assert found["held_out"] == held_out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
